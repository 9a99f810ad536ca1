# SPDX-License-Identifier: Apache-2.0
"""Deepfakes of speech: a folder of one's own, what is equal in real and fake speech, cepstra, and rates by set."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks._rates import equal_error_rate_values
from manyheads.tasks._statistics import auroc
from manyheads.tasks.speech import _whisper, speech_deepfakes
from manyheads.tasks.speech._cepstra import cepstra, constant_q, deltas, energies
from manyheads.tasks.speech.speech_deepfakes import Judgement, SpeechDeepfakes
from tiny.recordings import digits, write
from tiny.speech import tiny_whisper
from tolerance import GRADIENT, is_close, is_far

__all__ = ["digits"]


@pytest.fixture
def task(tmp_path, digits):
    for wav in digits.glob("*.wav"):
        digit, who, n = wav.stem.split("_")
        (tmp_path / f"{who}_{digit}{n}.wav").write_bytes(wav.read_bytes())
    return SpeechDeepfakes(folder=str(tmp_path), dim=16, heads=2, batch=6)


def test_a_folder_of_ones_own_and_vocoders_that_no_training_meets(task):
    kinds = {part: {s.about["vocoder"] for s in task.samples(part)} for part in ("train", "validation", "test")}
    seen = {"real", "griffin_lim", "lpc", "phase"}
    assert kinds == {"train": seen, "validation": seen, "test": seen | {"harmonic", "sinusoidal"}}
    assert [{s.group for s in task.samples(part)} for part in kinds] == [{"ann"}, {"bob"}, {"cid"}]
    test = task.samples("test")
    assert len(test) == 8 * 6 and {s.about["context"] for s in test} == {
        f"cid_{d}{n}" for d in range(4) for n in (0, 1)
    }
    assert {len(s.inputs) for s in test} == {8000}  # no length,
    assert max(float((s.inputs.std(correction=0) - 1).abs() + s.inputs.mean().abs()) for s in test) < 1e-4  # level,
    assert min(float(s.inputs.abs().min(0).values) for s in test) < 0.1 < min(float(s.inputs.std()) for s in test)
    assert not any((s.inputs[1:] == s.inputs[:-1]).float().mean() > 0.01 for s in test)  # or digital silence tells
    drawn = task.draw(np.random.default_rng(0), task.samples("train"))
    assert [s.target for s in drawn] == [0, 1] * 3


def test_a_recording_of_ones_own_is_opened_at_its_loudest_second(tmp_path):
    write(tmp_path / "a_0.wav", rate=16000, seconds=3.0)
    sample = SpeechDeepfakes.open(tmp_path / "a_0.wav")
    assert sample.target is None and sample.inputs.shape == (8000,)
    quiet = np.concatenate((np.zeros(8000), np.sin(np.arange(8000)), np.zeros(5000)))
    assert abs(speech_deepfakes._second(quiet)).min() < 1 and abs(speech_deepfakes._second(quiet).std() - 1) < 1e-6
    assert np.corrcoef(speech_deepfakes._second(quiet), np.sin(np.arange(8000)))[0, 1] > 0.99
    short = speech_deepfakes._second(np.arange(3000.0))
    assert np.array_equal(short[:3000], short[3000:6000])
    with pytest.raises(UserError, match="speaker_anything"):
        SpeechDeepfakes(folder=str(tmp_path / "none")).samples("train")
    assert str(Judgement(0.0)) == "fake with probability 0.500" and Judgement(-1e4).probability < 1e-20


def test_rates_are_of_real_speech_with_the_fakes_of_one_kind():
    rng, task = np.random.default_rng(0), SpeechDeepfakes()
    kinds = ["real", "lpc", "phase", "harmonic", "sinusoidal"]
    samples = [Sample(str(i), "g", "test", None, int(i % 5 > 0), {"vocoder": kinds[i % 5]}) for i in range(100)]
    said = [Judgement(float(x)) for x in rng.standard_normal(100) + [s.target for s in samples]]
    scores = task.scores(samples, said)
    logits, kind = np.array([one.logit for one in said]), np.array([s.about["vocoder"] for s in samples])
    for metric, fakes in (("eer", kinds[3:]), ("eer_seen", kinds[1:3]), ("eer_harmonic", ["harmonic"])):
        mine = np.isin(kind, ["real", *fakes])
        values = [one[metric] for one, counts in zip(scores, mine, strict=True) if counts]
        assert np.mean(values) == pytest.approx(equal_error_rate_values(logits[mine], kind[mine] != "real").mean())
        assert not any(metric in one for one, counts in zip(scores, mine, strict=True) if not counts)
    mine = np.isin(kind, ["real", *kinds[3:]])
    assert np.mean([one["auc"] for one in scores if "auc" in one]) == pytest.approx(
        auroc(logits[mine], kind[mine] != "real")
    )
    assert scores[1]["nll"] == pytest.approx(math.log1p(math.exp(-said[1].logit)))
    assert set(task.scores(samples[1:5], said[1:5])[0]) == {"nll"}  # without real speech there is no rate


@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_noise_is_20_to_40_db_below_whatever_is_heard(loud):
    tone, shares = loud * np.sin(np.arange(8000.0)), []
    for i in range(8):
        noisy = speech_deepfakes._noisy(np.random.default_rng(i), tone).double().numpy()
        own = (noisy @ tone) / (tone @ tone) * tone
        shares.append(10 * np.log10((own**2).sum() / ((noisy - own) ** 2).sum()))
    assert 19.5 < min(shares) < 28 and 32 < max(shares) < 40.5


def test_a_detector_is_the_sum_of_its_blocks():
    task = SpeechDeepfakes(dim=16, heads=2, layers=2, dropout=0.0)
    model, s, c = task.reference(16).eval(), torch.randn(2, 50, 384), torch.randn(2, 101, 60)
    x = model.fuse(s, c)
    first = x + model.blocks[0](x)
    assert torch.equal(model(s, c), model.head(model.pool(first + model.blocks[1](first))))


def test_filters_and_bins_are_where_they_should_be():
    at = torch.arange(8000) / 8000
    for rate in (500.0, 1000.0, 2500.0):
        tone = torch.sin(2 * math.pi * rate * at)
        assert abs(energies(tone, "lfcc")[50].argmax() - (rate / 4000 * 41 - 1)) <= 0.5
        mel = 2595 * math.log10(1 + rate / 700) / (2595 * math.log10(1 + 4000 / 700)) * 41 - 1
        assert abs(energies(tone, "mfcc")[50].argmax() - mel) <= 0.8 < abs(rate / 4000 * 41 - 1 - mel)
    for k in (0, 13, 48, 70):
        found = constant_q(torch.sin(2 * math.pi * 62.5 * 2 ** (k / 12) * at))[50]
        assert found.argmax() == k and found[k] == pytest.approx(0.25, rel=0.02)
    assert deltas(torch.ones(9, 3)).abs().max() == 0
    assert deltas(torch.arange(9.0)[:, None])[2:-2] == pytest.approx(torch.ones(5, 1))
    x = torch.randn(8000)
    first = cepstra(x, "lfcc")[:, :20]
    assert torch.equal(cepstra(x, "lfcc")[:, 20:], torch.cat((deltas(first), deltas(deltas(first))), 1))
    for kind in ("lfcc", "mfcc", "cqcc"):
        logs = energies(x, kind).clamp(min=1e-4).log().double().numpy()
        from scipy.fft import dct

        want = dct(logs, type=2, norm="ortho", axis=1)[:, :20]
        assert np.abs(cepstra(x, kind)[:, :20].numpy() - want).max() < 1e-3 * np.abs(want).max()


def test_the_encoder_reads_a_second_as_it_reads_thirty(monkeypatch):
    (model, extractor), calls = tiny_whisper(), []
    monkeypatch.setattr(_whisper, "whisper", lambda: (calls.append(1), (model, extractor, None))[1])
    monkeypatch.setattr(_whisper, "_kept", {})
    sound = torch.randn(30 * 8000)
    (whole,) = _whisper.encoder_features([sound], 8000)
    from manyheads.data.audio import resampled

    heard = extractor([0.1 * resampled(sound.numpy(), 8000, 16000)], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        want = model.get_encoder()(heard["input_features"]).last_hidden_state[0]
    assert (whole - want).abs().max() < 2e-3  # kept in 16 bits
    first, again, third = _whisper.encoder_features([sound[:8000], sound[:8000], sound[8000:16000]], 8000)
    assert first.shape == (50, 16) and torch.equal(first, again) and not torch.equal(first, third)
    made = len(calls)
    assert torch.equal(_whisper.encoder_features([sound[:8000]], 8000)[0], first) and len(calls) == made  # kept


def test_the_average_of_scores_trains_each_detector_for_itself():
    task = SpeechDeepfakes(dim=16, heads=2, dropout=0.0)
    model = task.reference(16, "score_average")
    batch = {
        "inputs": torch.randn(4, 50, 384),
        "spectral": torch.randn(4, 101, 60),
        "targets": torch.tensor([0.0, 1, 0, 1]),
    }
    task.loss(model, batch).backward()
    grads = [p.grad.clone() for p in model.detectors[0].parameters()]
    alone = SimpleNamespace(**{name: batch[name] for name in batch})
    model.zero_grad()
    logits = model.detectors[0](alone.inputs, alone.spectral)
    torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], alone.targets).backward()
    own = torch.cat([p.grad.flatten() for p in model.detectors[0].parameters()])
    halved = torch.cat([grad.flatten() for grad in grads])
    assert is_close(2 * halved, own, GRADIENT) and is_far(halved, own, GRADIENT)  # its own loss, a half of both
    said = task.predict(model.eval(), batch)
    both = model(batch["inputs"], batch["spectral"])
    assert both.shape == (4, 2) and [one.logit for one in said] == pytest.approx(both.mean(1).tolist())
