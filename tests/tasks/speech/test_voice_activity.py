# SPDX-License-Identifier: Apache-2.0
"""Streams, noises, labels and frame metrics of voice activity, cepstra by frame, and windows of Whisper's encoder."""

import numpy as np
import pytest
import torch
from scipy.fft import dct

from manyheads.data.audio import resampled
from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.speech import _whisper, voice_activity
from manyheads.tasks.speech._cepstra import normalised_mfcc
from manyheads.tasks.speech._encoder import log_mel
from manyheads.tasks.speech._mixtures import FRAME, NOISES, mixed, stream
from manyheads.tasks.speech.voice_activity import Activity, VoiceActivity
from tiny.recordings import digits
from tiny.speech import tiny_whisper

__all__ = ["digits"]

TINY = {"dim": 16, "layers": 1, "heads": 2, "batch": 4, "samples_judged": 6, "pool": 6}
WORDS = [torch.sin(torch.arange(2400) * 0.1 * (i + 1)) for i in range(4)]


@pytest.fixture
def made(monkeypatch):
    """Features of our own making in the place of Whisper's: two sums over a frame."""

    def sums(sound, rate):
        frames = sound[: len(sound) // FRAME * FRAME].view(-1, FRAME)
        return torch.stack((frames.sum(1), frames.abs().sum(1)), 1)

    monkeypatch.setattr(voice_activity, "windowed", sums)
    monkeypatch.setattr(voice_activity, "WIDTH", 2)
    voice_activity._read_sound.cache_clear()
    yield
    voice_activity._read_sound.cache_clear()


def test_labels_are_where_words_are():
    sound, labels = stream(np.random.default_rng(0), WORDS, 200)
    loud = np.abs(sound).reshape(200, FRAME).max(1) > 0
    assert sound.shape == (200 * FRAME,) and 0.1 < labels.mean() < 0.7
    assert (labels <= loud).all() and (labels != loud).mean() < 0.1  # a frame is one or the other by its greater part
    assert not (labels[::-1] <= loud).all()


def test_a_stream_begins_anywhere():
    first = [stream(np.random.default_rng(i), WORDS, 200)[1][0] for i in range(60)]
    assert 0.05 < np.mean(first) < 0.95  # in a word or in silence


def test_quiet_ends_of_a_recording_are_no_speech():
    word = torch.cat((1e-3 * torch.randn(1600), torch.randn(1600), 1e-3 * torch.randn(1600)))
    sound, labels = stream(np.random.default_rng(1), [word], 200)
    power = np.square(sound).reshape(200, FRAME).mean(1)
    assert (power[labels] > 1e-4).all() and 0 < labels.mean() < (power > 0).mean() - 0.1


@pytest.mark.parametrize("kind", list(NOISES))
@pytest.mark.parametrize("snr", [-5.0, 20.0])
def test_noise_is_as_loud_as_it_is_said_to_be(kind, snr):
    rng = np.random.default_rng(2)
    sound, labels = stream(rng, WORDS, 200)
    noisy = mixed(np.random.default_rng(3), sound, labels, kind, snr, WORDS).double().numpy()
    there = np.repeat(labels, FRAME)
    scale = (noisy * sound).sum() / np.square(
        sound
    ).sum()  # noise is independent of the words, but for a babble of them
    again = NOISES[kind](np.random.default_rng(3), len(sound), WORDS)
    both = np.stack((sound, again), 1)
    (scale, loud), *_ = np.linalg.lstsq(both, noisy, rcond=None)
    got = 10 * np.log10(np.square(scale * sound[there]).mean() / np.square(loud * again).mean())
    assert got == pytest.approx(snr, abs=0.01) and np.abs(both @ (scale, loud) - noisy).max() < 1e-3
    whole = 10 * np.log10(np.square(scale * sound).mean() / np.square(loud * again).mean())
    assert abs(whole - snr) > 1  # control: the power of silence is not counted


def test_noises_of_the_test_are_not_those_of_the_training(digits, made):
    task = VoiceActivity(folder=str(digits), **TINY)
    of = {part: {s.about["noise"] for s in task.judged(part)} for part in ("validation", "test")}
    drawn = task.draw(np.random.default_rng(0), task.samples("train"))
    assert {s.about["noise"] for s in drawn} | of["validation"] <= {"white", "pink", "hum"}
    assert of["test"] <= {"brown", "clatter", "babble"}
    assert len({float(s.inputs.sum()) for s in task.judged("test")}) == len(task.judged("test"))


def test_streams_of_the_pool_are_kept(digits, made):
    task = VoiceActivity(folder=str(digits), **{**TINY, "pool": 2, "batch": 8})
    drawn = task.draw(np.random.default_rng(0), task.samples("train"))
    assert len({id(s.inputs) for s in drawn}) == 2
    before = voice_activity._read_sound.cache_info().misses
    batch = task.collate(drawn)
    assert voice_activity._read_sound.cache_info().misses - before == 2
    assert batch["inputs"].shape == (8, 200, 20) and batch["states"].shape == (8, 200, 2)
    task.collate(task.draw(np.random.default_rng(1), task.samples("train")))
    assert voice_activity._read_sound.cache_info().misses - before == 2


def test_scores_are_those_by_hand():
    task, labels = VoiceActivity(**TINY), torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0, 0]).bool()
    sample = Sample("x", "g", "test", None, labels)
    speech = torch.tensor([0.1, 0.7, 0.8, 0.9, 0.3, 0.9, 0.2, 0.2, 0.2, 0.2])
    score = task.score(sample, Activity(speech))
    assert score["der"] == 2 / 4 and score["miss"] == 1 / 4 and score["false_alarm"] == 1 / 6
    assert score["f1"] == pytest.approx(6 / 8) and score["auc"] == pytest.approx(23 / 24)
    right = torch.where(labels, speech, 1 - speech).double()
    assert score["frame_nll"] == pytest.approx(float(-right.log().mean()), rel=1e-6)
    assert score["der"] == pytest.approx((score["miss"] * 4 + score["false_alarm"] * 6) / 4)
    always = task.score(sample, Activity(torch.ones(10)))
    assert (always["miss"], always["false_alarm"], always["der"], always["auc"]) == (0, 1, 6 / 4, 0.5)
    assert str(Activity(speech)) == "0.02-0.08, 0.10-0.12" and str(Activity(torch.zeros(3))) == ""


def test_cepstra_are_a_cosine_transform_of_the_filters():
    sound = torch.randn(3200)
    frames = log_mel(sound)[:40].view(20, 2, -1).mean(1)
    want = dct(frames.double().numpy(), norm="ortho", axis=1)[:, :20]
    got = normalised_mfcc(sound).numpy()
    assert got.shape == (20, 20) and np.abs(got - want).max() < 1e-4
    assert np.abs(got - dct(frames.double().numpy(), axis=1)[:, :20]).max() > 0.1


def test_states_of_the_encoder_are_by_frame_and_window(monkeypatch):
    """As of transformers' encoder with the first 200 positions, on four seconds at a time."""
    model, extractor = tiny_whisper()
    monkeypatch.setattr(_whisper, "whisper", lambda: (model, extractor, None))
    sound = torch.randn(45_000)
    found = _whisper.windowed(sound, 8000)
    cut = type(model.get_encoder())(type(model.config)(**{**model.config.to_dict(), "max_source_positions": 200}))
    state = model.get_encoder().state_dict()
    cut.load_state_dict({**state, "embed_positions.weight": state["embed_positions.weight"][:200]})
    second = np.concatenate((sound[200 * FRAME :].numpy(), np.zeros(400 * FRAME - len(sound), np.float32)))
    for part, want in ((sound[: 200 * FRAME].numpy(), found[:200]), (second, found[200:])):
        heard = extractor(
            resampled(part / 10, 8000, 16000), sampling_rate=16000, padding="longest", truncation=False,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            states = cut.eval()(heard["input_features"]).last_hidden_state[0, : len(want)]
        assert (states - want).abs().max() < 1e-4 < 1e-2 < (states.flip(0) - want).abs().max()
    assert found.shape == (281, 16)
    assert torch.equal(found[:200], _whisper.windowed(sound[: 200 * FRAME], 8000))
    with pytest.raises(UserError, match=r"0\.02 s"):
        _whisper.windowed(sound[:159], 8000)
