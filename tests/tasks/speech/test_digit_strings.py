# SPDX-License-Identifier: Apache-2.0
"""Digit strings: a folder of one's own, gaps, scores by hand, and the confusion of digits."""

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks._field import parted
from manyheads.tasks.speech._ctc import best_paths, ctc_losses, ctc_mean
from manyheads.tasks.speech._digits import Transcript, at_pace, paced
from manyheads.tasks.speech._encoder import Conformer, SpeechEncoder, log_mel
from manyheads.tasks.speech.digit_strings import DigitStrings
from tiny.recordings import digits, write
from tolerance import is_close

__all__ = ["digits"]

TINY = {"dim": 16, "layers": 1, "heads": 2, "batch": 4, "digits": 2, "samples_judged": 5}


def test_a_folder_of_ones_own(digits):
    task = DigitStrings(folder=str(digits), **TINY)
    assert {part: {s.group for s in task.samples(part)} for part in ("train", "validation", "test")} == {
        "train": {"ann"}, "validation": {"bob"}, "test": {"cid"},
    }  # fmt: skip
    (sound,) = {len(sample.inputs) for sample in task.samples("train")}
    assert sound == 2400  # 0.3 s, from 16 to 8 kHz
    judged = task.judged("test")
    assert len(judged) == 4 and all(len(sample.target.split()) == 2 for sample in judged)
    spoken = sorted(digit for sample in judged for digit in sample.target.split())
    assert spoken == sorted(sample.target for sample in task.samples("test"))  # every recording once
    assert all(2 * 2400 <= len(s.inputs) <= 2 * 2400 + 3 * 800 for s in judged)


@pytest.mark.parametrize("names", [["a.wav"], ["0_ann_0.wav", "1_bob_0.wav"]])
def test_a_folder_that_will_not_do(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"digit_speaker_number|three are needed"):
        DigitStrings(folder=str(tmp_path), **TINY).samples("train")


def test_groups_of_ones_own_are_parted():
    found = parted([f"{i:02}" for i in range(11)])
    assert list(found.values()) == ["train"] * 7 + ["validation"] * 2 + ["test"] * 2


def test_scores_are_those_by_hand():
    task = DigitStrings(**TINY)
    sample, probabilities = Sample("x", "g", "test", None, "3 3"), torch.zeros(3, 11).log_softmax(-1)
    for said, wrong in (("3 3", 0), ("3", 0.5), ("", 1), ("3 4 5", 1), ("1 2 3 4 5", 2)):
        score = task.score(sample, Transcript(said, probabilities))
        assert score["wer"] == wrong and score["exact"] == (wrong == 0)
    # Three frames, all classes alike: "3 blank 3" alone says 3 3.
    assert score["ctc_nll"] == pytest.approx(3 * np.log(11) / 2)
    short = ctc_losses(
        probabilities[None, :2], torch.ones(1, 2, dtype=torch.bool), torch.tensor([[4, 4]]), torch.tensor([2])
    )
    assert short.tolist() == [0.0]  # no path: it counts for nothing, and is not infinite


def test_confusions_are_counted():
    task = DigitStrings(**TINY)
    sounds = [Sample(str(i), "g", "test", torch.randn(4000), "1 2") for i in range(4)]
    said = [Transcript(text, torch.zeros(12, 11).log_softmax(-1)) for text in ("1 2", "1 3", "1", "1 2 7")]
    confusion, seen = task.pictures(sounds, said)
    values = np.array(confusion.values)
    assert values[1, 1] == 1 and values[2].tolist() == [0, 0, 0.5, 0.25, 0, 0, 0, 0, 0, 0, 0.25] and values[10, 7] == 1
    assert np.array(seen.values).shape == (len(seen.rows), len(seen.columns)) == (51, 12)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("samples", [3000, 3050])  # an even and an odd number of frames
def test_padding_does_not_reach_speech(samples, blocks):
    model = SpeechEncoder([Conformer(16, 2, 32, 0.0, 5) for _ in range(blocks)], 16, 11).eval()
    frames = log_mel(torch.randn(samples))
    alone, _ = model(frames[None], torch.ones(1, len(frames), dtype=torch.bool))
    garbage = torch.full((1, len(frames) + 13, 40), 1e3)
    garbage[0, : len(frames)] = frames
    mask = torch.arange(garbage.shape[1])[None] < len(frames)
    filled, there = model(garbage, mask)
    assert there.sum() == alone.shape[1]
    assert (filled[0, : alone.shape[1]] - alone[0]).abs().max() < 1e-5
    unmasked, _ = model(garbage, torch.ones_like(mask))
    assert (unmasked[0, : alone.shape[1]] - alone[0]).abs().max() > 1e-2


def test_frames_are_normalised_and_short_recordings_have_one():
    frames = log_mel(torch.randn(8000))
    assert frames.shape == (101, 40) and frames.mean(0).abs().max() < 1e-4
    assert log_mel(torch.zeros(10)).isfinite().all()


def test_paths_and_losses_are_of_what_is_there_and_of_words():
    logits = torch.randn(2, 9, 11)
    logits[0, :6] = 9 * torch.nn.functional.one_hot(torch.tensor([0, 4, 4, 0, 4, 8]), 11)
    logits[0, 6:, 2] += 99
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    assert best_paths(logits, mask)[0] == "3 3 7"
    targets, counts = torch.tensor([[4, 4, 8], [1, 0, 0]]), torch.tensor([3, 1])
    each = ctc_losses(logits, mask, targets, counts)
    assert ctc_mean(logits, mask, targets, counts) == pytest.approx(float(each.sum()) / 4)

    class Said(torch.nn.Module):
        def forward(self, frames, there):
            return logits, mask

    found = DigitStrings(**TINY).predict(Said(), {"inputs": None, "mask": None})
    assert [len(one.log_probs) for one in found] == [6, 9] and found[0].text == "3 3 7"
    assert is_close(found[0].log_probs, logits[0, :6].log_softmax(-1))


def test_words_are_read_faster_and_slower_alike():
    sound = torch.sin(torch.arange(800) * 0.1)
    assert len(at_pace(sound, 2.0)) == 400 and len(at_pace(sound, 0.5)) == 1600
    assert (at_pace(sound, 2.0)[1:-1] - sound[2:-2:2]).abs().max() < 0.2
    rng = np.random.default_rng(0)
    paces = [800 / len(paced(rng, sound, 0.2)) for _ in range(300)]
    assert 0.79 < min(paces) < 0.82 and 1.18 < max(paces) < 1.21 and abs(np.mean(paces) - 1) < 0.02
