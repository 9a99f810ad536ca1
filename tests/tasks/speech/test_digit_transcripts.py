# SPDX-License-Identifier: Apache-2.0
"""Transcripts of digits: strings, who sees whom in the references, digits of a transcript, scores, hypotheses."""

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.speech import _whisper
from manyheads.tasks.speech.digit_transcripts import END, HIDDEN, ROOM, DigitTranscripts, _row, _string
from tiny.recordings import digits, write

__all__ = ["digits"]

TINY = {"dim": 16, "layers": 1, "heads": 2, "batch": 4, "dropout": 0.0}


def test_strings_of_a_folder_of_ones_own(digits):
    task = DigitTranscripts(folder=str(digits), **TINY)
    assert [{s.group for s in task.samples(part)} for part in ("train", "validation", "test")] == [
        {"ann"}, {"bob"}, {"cid"},
    ]  # fmt: skip
    test = task.samples("test")
    assert all(2 <= len(s.target.split()) <= ROOM - 1 and s.inputs.shape == (25_600,) for s in test)
    assert sum(len(s.target.split()) for s in test) <= 8  # every recording once at most
    assert len(task.samples("train")) == 150 and all(abs(float(s.inputs.std()) - 1) < 1e-3 for s in test)


def test_recordings_that_are_too_long_are_refused(tmp_path):
    write(tmp_path / "long.wav", seconds=4.0)
    write(tmp_path / "short.wav", seconds=1.0)
    with pytest.raises(UserError, match=r"at most 3\.2 s"):
        DigitTranscripts.open(tmp_path / "long.wav")
    sample = DigitTranscripts.open(tmp_path / "short.wav")
    assert sample.target is None and sample.inputs.shape == (25_600,) and sample.inputs[9000:].std() == 0


def test_scores_are_those_by_hand():
    task, sample = DigitTranscripts(**TINY), Sample("x", "g", "test", None, "3 3 1")
    for said, wrong, length in (("3 3 1", 0, 0), ("3 1", 1 / 3, 1), ("", 1, 3), ("3 3 2 1 1", 2 / 3, 2)):
        score = task.score(sample, said)
        assert score == {"wer": pytest.approx(wrong), "exact": float(wrong == 0), "length_error": length}
    assert _row("1 2").tolist() == [1, 2] + [END] * 4 and _row("1 2 3 4 5 6 7").tolist() == [1, 2, 3, 4, 5, 6]


def test_digits_of_a_transcript():
    for text, want in ((" Two, three, 5.", "2 3 5"), ("5, 78.", "5 7 8"), ("Hey, you, won, eight", "8"), ("", "")):
        assert _whisper.digits_of(text) == want


def test_who_sees_whom():
    task = DigitTranscripts(**TINY)
    torch.manual_seed(0)
    heard, words = torch.randn(2, 160, 384), torch.randint(0, 10, (2, ROOM))
    other = words.clone()
    other[:, 3] = (other[:, 3] + 1) % 10
    model = task.reference(16).eval()
    changed = (model(heard, words) != model(heard, other)).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3  # left to right
    model.order = "any"
    assert (model(heard, words) != model(heard, other)).any(-1).all()  # control
    far = heard.clone()
    far[:, 80] = torch.randn(384)
    model.order = "left"
    assert (model(far, words) != model(heard, words)).any(-1).all()


def test_words_know_the_order_of_what_is_heard():
    torch.manual_seed(0)
    model = DigitTranscripts(**TINY).reference(16).eval()
    heard, words = torch.randn(1, 40, 4, 384), torch.full((1, ROOM), HIDDEN)
    said, turned = (model(x.flatten(1, 2), words) for x in (heard, heard.flip(1)))
    assert (said - turned).abs().max() > 1e-4
    with torch.no_grad():
        model.places[ROOM:] = 0  # control: without places it is a set
    said, turned = (model(x.flatten(1, 2), words) for x in (heard, heard.flip(1)))
    assert (said - turned).abs().max() < 1e-5


def test_noise_is_0_to_15_db_below_words():
    found, words = [], [Sample("w", "g", "train", torch.sin(torch.arange(3200) * 0.1) * 2**0.5, "1")] * 2
    for i in range(40):
        sound = _string(np.random.default_rng(i), words, "x").inputs
        tail, share = float(sound[-12_000:].square().mean()), 2 * 3200 / 25_600
        found.append(-10 * np.log10(tail * share / (1 - tail)))  # of the noise alone, and of both
    assert -0.5 < min(found) < 4 and 11 < max(found) < 15.5


def test_autoregressive_writing_is_by_its_own_words():
    task = DigitTranscripts(**TINY)
    torch.manual_seed(0)
    model, heard = task.reference(16).eval(), torch.randn(3, 160, 384)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    rows = []
    for one in heard:
        words = [HIDDEN]
        while len(words) <= ROOM:
            filled = torch.tensor([words + [0] * (ROOM - len(words))])
            words.append(int(model(one[None], filled[:, :ROOM])[0, len(words) - 1].argmax()))
        rows.append(words[1:])
    want = [" ".join(map(str, row[: row.index(END)] if END in row else row)) for row in rows]
    assert task.predict(model, {"inputs": heard}) == want


def test_ctc_takes_the_best_path_and_learns_of_counts():
    task = DigitTranscripts(**TINY)

    class Fixed(torch.nn.Module):
        order = "ctc"

        def forward(self, features):
            path = [END, 3, 3, END, 3, 7, END] + [END] * 33
            return 9 * torch.nn.functional.one_hot(torch.tensor([path]), END + 1).float()

    assert task.predict(Fixed(), {"inputs": torch.zeros(1, 160, 384)}) == ["3 3 7"]
    losses = [
        float(task.loss(Fixed(), {"inputs": torch.zeros(1, 160, 384), "targets": _row(text)[None]}))
        for text in ("3 3 7", "3 3 8", "3 7")
    ]
    assert losses[0] < 0.2 < 1 < min(losses[1:])


def test_hypotheses_are_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(_whisper, "encoder_features", lambda sounds, rate: [torch.zeros(160, 384) for _ in sounds])
    from manyheads.tasks.speech import digit_transcripts as module

    monkeypatch.setattr(module, "encoder_features", lambda sounds, rate: [torch.zeros(160, 384) for _ in sounds])
    monkeypatch.setattr(
        module, "hypotheses", lambda sounds, rate: (asked.append(len(sounds)), ["1 2"] * len(sounds))[1]
    )
    batch = DigitTranscripts(**TINY).collate([Sample(str(i), "g", "test", torch.zeros(25_600), "1") for i in range(3)])
    assert asked == [] and batch["hypotheses"]().tolist() == [[1, 2] + [END] * 4] * 3 and asked == [3]
