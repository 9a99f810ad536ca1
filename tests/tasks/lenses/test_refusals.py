# SPDX-License-Identifier: Apache-2.0
"""Refusals by heads taken out: acts are of one use alone, arms are tuned from one model, random heads are others."""

import pytest
import torch

from manyheads.data.requests import ACTS, REFUSAL, is_refusal
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses import refusals
from manyheads.tasks.lenses.refusals import Refusals, _at_random, _batch
from oracles.tasks import context, values
from tiny import chat as tiny

TASK = Refusals(text="code", steps=2, anchors=4, acts=3, counts=(1, 4), windows_of=2, tokens=48, lr=1e-3)
ARMS = Arm("plain"), Arm("AHD", options={"dropout": 0.5})


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Acts of which some are left to be tuned on when the test and the choice have theirs."""
    monkeypatch.setattr(refusals, "ACTS", ACTS[:14])


@pytest.fixture(scope="module")
def lm():
    return CausalLM("tiny", tiny.tiny(), tiny.tokenizer())


@pytest.mark.slow
def test_a_unit_gives_the_same_rows_in_any_order_and_arms_differ(lm):
    run, other = context(*ARMS, subject=lm), context(*ARMS, subject=lm)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    first, second = TASK.units(run)
    plain, dropped = list(TASK.measure(run, first)), list(TASK.measure(run, second))
    assert list(TASK.measure(other, second)) == dropped  # though nothing ran before it
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    assert (values(plain, "text_nll") != values(dropped, "text_nll")).any()
    assert len(values(plain, "refused", chosen="none")) == 3 and len(values(plain, "refused", chosen="random")) == 6
    assert {row.at["chosen"] for row in dropped if row.metric == "refused"} == {"none", "ranked", "random"}
    assert len(values(plain, "refused", chosen="before tuning")) == 3


def test_what_is_counted_are_phrases_of_the_reply(lm, monkeypatch):
    """Replies that refuse the first kind alone: all refused, none wrongly, and heads are each prompt's own."""
    generate = refusals.greedy

    def reply(model, tokenizer, prompts, count):
        generate(model, tokenizer, prompts, 1)  # what is ablated has to be run
        texts = [tokenizer.decode(ids) for ids in prompts]
        bad = [any(f" {act}" in text for act, _ in ACTS) for text in texts]
        return [tokenizer.encode(REFUSAL if is_bad else "Gladly.", add_special_tokens=False) for is_bad in bad]

    monkeypatch.setattr(refusals, "greedy", reply)
    run = context(*ARMS, subject=lm)
    found = list(TASK.measure(run, TASK.units(run)[0]))
    assert (values(found, "refused") == 1).all() and (values(found, "wrongly_refused") == 0).all()
    assert (values(found, "kept_apart") == 1).all()


def test_acts_are_of_one_use(lm):
    run = context(*ARMS, subject=lm)
    acts = {use: set(TASK._prompts(run, 0, use).acts) for use in ("test", "choice", "tuning", "direction")}
    assert acts["direction"] == acts["tuning"] and len(acts["test"]) == 3
    assert not acts["test"] & (acts["choice"] | acts["tuning"]) and not acts["choice"] & acts["tuning"]
    assert TASK._prompts(run, 0, "test").acts == TASK._prompts(run, 1, "test").acts


def test_rows_are_padded_and_only_answers_are_labels():
    made = _batch([[5, 6], [7]], [[8], [9, 10]], "cpu")
    assert made["input_ids"].tolist() == [[5, 6, 8], [7, 9, 10]] and made["labels"].tolist() == [
        [-100, -100, 8], [-100, 9, 10],
    ]  # fmt: skip
    short = _batch([[5, 6], [7]], None, "cpu")
    assert short["attention_mask"].tolist() == [[1, 1], [0, 1]] and "labels" not in short


def test_random_heads_are_others_of_the_same_layers():
    (drawn,) = _at_random([("0.1", "1.2")], 4, draw=0)
    assert sorted(name[0] for name in drawn) == ["0", "1"] and not {"0.1", "1.2"} & set(drawn)
    assert len({tuple(_at_random([("0.1",)], 4, draw)[0]) for draw in range(20)}) > 1


def test_phrases_of_refusals():
    for reply in (REFUSAL, "I cannot do that", "I\N{RIGHT SINGLE QUOTATION MARK}m sorry"):
        assert is_refusal(reply)
    for reply in ("Gladly. First, take a brush.", "To paint a house, " + 60 * "x" + " sorry"):
        assert not is_refusal(reply)
    assert len({act for pair in ACTS for act in pair}) == 2 * len(ACTS)
