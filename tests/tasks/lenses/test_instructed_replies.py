# SPDX-License-Identifier: Apache-2.0
"""Following an instruction: likelihoods and attention are those of one forward, gains and correlations by hand."""

import numpy as np
import pytest
import torch

import manyheads
from manyheads.data.support_dialogues import INSTRUCTIONS, dialogues
from manyheads.experiment import Arm, CausalLM
from manyheads.lenses.strategy_attention import sra
from manyheads.tasks.lenses import instructed_replies
from manyheads.tasks.lenses.instructed_replies import InstructedReplies, _alike, _read, _z
from oracles.tasks import context, rows, values
from tolerance import is_close

ARMS = Arm("standard"), Arm("c1_hf", options={"form": "c1_hf"})
TASK = InstructedReplies(turns=(1, 3), samples=2, source="made", reply=2)


@pytest.fixture(scope="module")
def lm():
    subject = CausalLM("default")
    subject.load("cpu")
    return subject


def test_read_is_one_forward_of_each_reply(lm):
    """Prompts of several lengths together give what each gives by itself, likelihoods and attention."""
    generator = torch.Generator().manual_seed(0)
    first, other, *replies = (torch.randint(100, 400, (n,), generator=generator).tolist() for n in (20, 13, 5, 3, 7))
    prompts, own, spans = [first, other, first], [1, 2, 0], [(4, 9), (2, 5), (5, 10)]
    likely, seen = _read(lm.model, prompts, replies, own, spans)
    for n, prompt in enumerate(prompts):
        last = len(prompt) - 1
        for value, reply in zip(likely[n], replies, strict=True):
            with torch.no_grad():
                logits = lm.model(torch.tensor([prompt + reply])).logits[0, last:-1].log_softmax(-1)
            assert value == pytest.approx(float(logits[range(len(reply)), reply].sum()), abs=1e-3)
        mine = replies[own[n]]
        roles = manyheads.TokenSpans({"system": [[spans[n]]], "response": [[(last, last + len(mine))]]})
        with manyheads.watch(lm.model, "strategy_attention", roles=roles) as whole, torch.no_grad():
            lm.model(torch.tensor([prompt + mine]))
        for name in ("sra", "lift"):
            assert seen[n][name] == pytest.approx(float(sra(whole.compute().tables[name])[0]), rel=1e-3)
        (alone,), (looked,) = _read(lm.model, [prompt], replies, own[n : n + 1], spans[n : n + 1])
        assert likely[n] == pytest.approx(alone, abs=1e-3) and seen[n] == pytest.approx(looked, rel=1e-3)
    shifted = _read(lm.model, [first], replies, [1], [(5, 10)])[1][0]
    assert shifted["sra"] != pytest.approx(seen[0]["sra"], rel=1e-3)


def test_prompts_of_about_one_length_are_read_together():
    groups = _alike([3, 9, 4, 8, 2], 20)
    assert groups == [[1, 3], [2, 0, 4]] and _alike([30], 20) == [[0]]


def test_a_reply_that_gains_most_is_right(lm, monkeypatch):
    """Likely replies do not win by that: what counts is what the instruction adds."""
    table = np.array([[0.0, -3, -9, -9], [-1, -5, -9, -9], [-1, -5, -7, -9], [-1, -5, -9, -9]])

    def read(model, prompts, replies, own, spans):
        return table[own], [{"sra": 1.0, "lift": 1.0} for _ in own]

    monkeypatch.setattr(instructed_replies, "_read", read)
    run = context(*ARMS, subject=lm)
    found = TASK._judged(run, TASK._asked(run)[:4])
    # Less the mean of each column: the first gains most in the second's reply though its own is the likeliest of all,
    # the second loses in three, and the last, whose reply is the least likely, loses nothing by its own alone.
    assert [each["accuracy"] for each in found] == [0, 0, 1, 1]


@pytest.mark.slow
def test_layouts_at_the_greatest_length(lm):
    found = rows(TASK, context(*ARMS, subject=lm))
    assert {row.at["turns"] for row in found if row.arm == "c1_hf"} == {3}
    assert len(values(found, "accuracy", "standard")) == 2 * 2 * len(INSTRUCTIONS)
    near, far = (values(found, "sra", "standard", turns=turns).mean() for turns in (1, 3))
    assert near > far > 0
    together = values(found, "goes_with_accuracy", of="sra", over="all")
    right, score = values(found, "accuracy", "standard"), np.log(values(found, "sra", "standard"))
    if right.std() > 0:
        assert together.mean() == pytest.approx(np.corrcoef(right, score)[0, 1], abs=1e-6)


def test_z_scores_of_groups():
    assert is_close(_z(np.array([1.0, 3, 5, 5]), [0, 0, 1, 1]), [-1, 1, 0, 0])


def test_replies_follow_their_own_instruction_alone():
    for each in INSTRUCTIONS:
        assert [other.name for other in INSTRUCTIONS if each.followed(other.reply)] == [each.name]
    plain = "I am sorry to hear that. Please tell me more."
    assert not any(each.followed(plain) for each in INSTRUCTIONS)


def test_made_dialogues():
    made = dialogues(5, "made")
    assert len(made) == 8 and all(len(turns) == 5 for turns in made)
    assert [message["role"] for message in made[0]] == ["user", "assistant"] * 2 + ["user"]
