# SPDX-License-Identifier: Apache-2.0
"""Spoken commands: the grammar, few labels, Whisper's features and encoder, and slots one after the other."""

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.speech._commands import SLOTS, Command, whisper_mel
from manyheads.tasks.speech.spoken_commands import SpokenCommands, WhisperStates
from tiny.recordings import digits
from tolerance import SAME, error

__all__ = ["digits"]

TINY = {"dim": 16, "layers": 1, "heads": 2, "batch": 6}


def test_the_grammar_by_hand():
    assert str(Command.of("6 3 9")) == "increase heat hall" and Command.of("6 3 9").values == (2, 1, 4)
    assert Command.of("7") == Command.of("7 7 7") and Command.of("7").values == (3, 1, 2)
    assert len({Command.of(f"{a} {b} {c}") for a in range(10) for b in range(10) for c in range(10)}) == 40
    assert len({Command.of(str(a)) for a in range(10)}) == 10


def test_few_commands_are_labelled_and_all_words_transcribed(digits):
    task = SpokenCommands(folder=str(digits), words=1, commands=3, stretch=0.0, **TINY)
    samples = task.samples("train")
    drawn = [s for i in range(20) for s in task.draw(np.random.default_rng(i), samples)]
    assert len({s.name for s in drawn}) == 3 and len({s.target for s in drawn}) <= 3
    told = [
        tuple(t) for i in range(20) for t in task.transcribed(np.random.default_rng(i), samples)["targets"].tolist()
    ]
    assert set(told) == {(1,), (2,), (3,), (4,)}
    spelt = task.transcribed(np.random.default_rng(0), samples, letters=True)
    words = {
        "".join(chr(96 + k) for k in row[:n])
        for row, n in zip(spelt["targets"].tolist(), spelt["counts"].tolist(), strict=True)
    }
    assert words <= {"zero", "one", "two", "three"}
    assert {s.about["spoken"] for s in task.judged("test")} == {"zero", "one", "two", "three"}
    assert task.open(next(digits.glob("*.wav"))).target is None


def test_features_are_whispers():
    """As its extractor has them of the same sound at 16 kHz; of another loudness they are others."""
    from transformers import WhisperFeatureExtractor

    time = np.arange(16000) / 16000
    fine = sum(np.sin(2 * np.pi * f * time + f) for f in (200, 450, 900, 1700, 3000))
    want = WhisperFeatureExtractor()(0.1 * fine, sampling_rate=16000, return_tensors="np")["input_features"][0].T[:100]
    got = whisper_mel(torch.from_numpy(fine[::2]).float()).numpy()
    assert got.shape == (100, 80)
    inner, heard = slice(5, 95), want[50] > want[50].max() - 1.0  # filters in which there is sound
    assert heard.sum() >= 5 and np.abs(got[inner][:, heard] - want[inner][:, heard]).max() < 0.01
    louder = whisper_mel(10 * torch.from_numpy(fine[::2]).float()).numpy()
    assert np.abs(louder[inner][:, heard] - want[inner][:, heard]).min() > 0.4


def test_states_are_those_of_transformers_whisper_and_padding_does_not_reach_them():
    torch.manual_seed(0)
    encoder = WhisperStates(16, 2, 2, 0.0).eval()
    whole = torch.randn(1, 3000, 80)
    with torch.no_grad():
        want = encoder.inside(whole.mT).last_hidden_state
        assert error(encoder(whole, torch.ones(1, 3000, dtype=torch.bool))[0], want) <= SAME
        short, mask = whole[:, :101], torch.arange(150)[None] < 101
        alone, there = encoder(short, mask[:, :101])
        garbage = torch.full((1, 150, 80), 1e3)
        garbage[:, :101] = short
        filled, kept = encoder(garbage, mask)
        assert kept.sum() == there.sum() == 51 and error(filled[:, :51], alone) <= SAME
        assert error(encoder(garbage, torch.ones_like(mask))[0][:, :51], alone) > 0.01


def test_what_stands_still_has_no_gradient():
    encoder = WhisperStates(16, 1, 2, 0.0)
    frames, mask = torch.randn(2, 20, 80), torch.ones(2, 20, dtype=torch.bool)
    assert encoder(frames, mask)[0].requires_grad
    encoder.still.fill_(True)
    assert not encoder(frames, mask)[0].requires_grad and "still" in encoder.state_dict()


def test_slots_are_said_one_after_the_other():
    """A step of greedy decoding is that of all slots at once given what came before, and knows its own values alone."""
    torch.manual_seed(0)
    task = SpokenCommands(**TINY)
    model = task.reference(16).eval()
    x, mask = torch.randn(4, 7, 16), torch.ones(4, 7, dtype=torch.bool)
    before = torch.tensor([[1, 4], [0, 5], [3, 4], [2, 5]])
    logits = model.decode(x, mask, before)
    assert logits.shape == (4, 3, 11)
    ranges = [range(4), range(4, 6), range(6, 11)]
    for i, allowed in enumerate(ranges):
        assert set(logits[0, i].isfinite().nonzero().flatten().tolist()) == set(allowed)
        assert error(model.decode(x, mask, before[:, :i])[:, -1][:, allowed], logits[:, i][:, allowed]) <= SAME
    other = before.clone()
    other[:, 0] = (other[:, 0] + 1) % 4
    changed = model.decode(x, mask, other)
    assert torch.equal(changed[:, 0], logits[:, 0]) and (changed[:, 2] != logits[:, 2])[:, 6:].any()


def test_the_loss_is_of_each_slot_given_those_before_and_padding_is_not_attended_to(digits):
    task = SpokenCommands(folder=str(digits), words=1, commands=4, **{**TINY, "dropout": 0.0})
    torch.manual_seed(0)
    model = task.reference(16).eval()
    batch = task.collate(task.draw(np.random.default_rng(0), task.samples("train")))
    x, mask = model.encoder(batch["inputs"], batch["mask"])
    targets = batch["targets"] + torch.tensor([0, 4, 6])
    said = [model.decode(x, mask, targets[:, :i])[:, -1].log_softmax(-1) for i in range(3)]
    want = -torch.stack([row.gather(1, targets[:, i : i + 1]) for i, row in enumerate(said)]).mean()
    assert error(task.loss(model, batch), want) <= SAME
    garbage = torch.where(mask[..., None], x, 1e3)
    mask[:, -3:], garbage[:, -3:] = False, 1e3
    allowed = targets[:, :2]
    alone = model.decode(x[:, :-3], mask[:, :-3], allowed)
    assert error(model.decode(garbage, mask, allowed).exp(), alone.exp()) <= SAME
    assert error(model.decode(garbage, torch.ones_like(mask), allowed).exp(), alone.exp()) > 0.01


def test_scores_are_those_by_hand():
    task = SpokenCommands(**TINY)
    sample = Sample("x", "g", "test", None, (1, 0, 3))
    for said, slots in (((1, 0, 3), 1.0), ((1, 1, 3), 2 / 3), ((0, 1, 2), 0.0)):
        assert task.score(sample, Command(said)) == {"intent": float(slots == 1), "slots": slots}
    first, *_ = task.pictures([sample, sample], [Command((1, 0, 3)), Command((2, 0, 3))])
    assert first.rows == list(SLOTS["action"]) and first.values[1] == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("fields", [{"words": 2}, {"commands": 0}, {"stretch": 1.0}])
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(UserError, match="words is 1 or 3"):
        SpokenCommands(**TINY, **fields)
    with pytest.raises(UserError, match="no other blocks"):
        SpokenCommands(**TINY).around([])
