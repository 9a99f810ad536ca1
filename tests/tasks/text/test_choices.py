# SPDX-License-Identifier: Apache-2.0
"""Choices by likelihood, each candidate found again alone and token by token; and how they are compared."""

import math

import pytest
import torch

from manyheads import parse, use
from manyheads.experiment import Arm
from manyheads.integrations.transformers import new_cache
from manyheads.tasks import load
from manyheads.tasks.text._choices import Choice, continued
from oracles import models
from tiny import chat as tiny
from tiny.compare import tiny as plain
from tolerance import SAME

ROWS = [[[3, 9, 4, 7], [3, 9, 5], [3, 9, 4, 8, 2, 6]], [[3, 11], [3, 12, 1]]]


def alone(model, spec, read, row, counted):
    """Nats of the last ``counted`` tokens of a row, fed one by one behind what was read."""
    with use(model), torch.no_grad():
        cache = new_cache(model, parse(spec))
        model(read, past_key_values=cache)
        total = 0.0
        for i, token in enumerate(row[:-1]):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].double()
            if i + 1 >= len(row) - counted:
                total += float(logits[row[i + 1]] - logits.logsumexp(0))
    return total


@pytest.mark.parametrize("spec", ["full", "snapkv:budget=12,window_size=4", "knorm:budget=12"])
def test_candidates_are_what_they_are_alone(spec):
    """The first token of all is read but not counted, nor is what a group has in common; groups do not mix."""
    model, read = models.build("llama", dtype=torch.float64), models.tokens(1, 30, seed=4)
    with use(model), torch.no_grad():
        cache = new_cache(model, parse(spec))
        model(read, past_key_values=cache)
        found = continued(model, cache, ROWS)
    common = (2, 1)
    for group, nats, shared in zip(ROWS, found, common, strict=True):
        for row, value in zip(group, nats, strict=True):
            assert value == pytest.approx(alone(model, spec, read, row, len(row) - shared), rel=10 * SAME)
            wrong = alone(model, spec, read, row, len(row) - shared - 1) if len(row) - shared > 1 else 0.0
            assert abs(value - wrong) > 0.1  # a token too few


def test_what_is_compared():
    """Per byte of the candidate, or against the prior; the tie is shared, and the lead is that over the best other."""
    one = Choice("chosen", (" Oslo", " Helsinki", " Rome"))
    assert one.value([-5.0, -18.0, -10.0]) == (1, pytest.approx(-1 - -2))
    assert one.value([-10.0, -13.5, -10.0])[0] == 0  # by sums it would tie with the last, and beat Helsinki
    assert one.value([-5.0, -9.0, -5.0])[0] == pytest.approx(1 / 3)
    assert Choice("chosen", ("a", "é"), right=1).value([-1.5, -2.0])[0] == 1  # two bytes
    assert one.value([-5.0, -18.0, -10.0], [-4.0, -20.0, -10.0]) == (0, pytest.approx(-3))
    assert one.value([-5.0, -18.0, -10.0], [-6.0, -18.0, -10.0]) == (1, pytest.approx(1))


def test_a_task_takes_what_the_whole_text_says():
    """``chat.qa`` with the whole cache: the choice that one forward over all of the text makes, per byte."""
    reader, model = tiny.tokenizer(), plain()
    run, task = tiny.context(model, reader), load("chat.qa")(lengths=(1400,), samples=1, reply=0)
    (asked,) = task.asked(run, 1400, 0)
    rows = list(tiny.rows(task, run))
    assert [row.metric for row in rows] == ["chosen"] * 4
    for query, row in zip(asked.queries, rows, strict=True):
        (choice,) = query.choices
        texts = [[*asked.heads, query.tail, choice.opening + text] for text in choice.candidates]
        every = [
            [token for part in parts for token in reader.encode(part, add_special_tokens=False)] for parts in texts
        ]
        common = next(i for i in range(len(every[0])) if len({ids[i] for ids in every}) > 1)
        scores = []
        for text, ids in zip(choice.candidates, every, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            nats = sum(float(logits[i - 1, ids[i]] - logits[i - 1].logsumexp(0)) for i in range(common, len(ids)))
            scores.append(nats / len(text.encode()))
        best = max(range(4), key=lambda i: scores[i])
        if abs(scores[0] - max(scores[1:])) > 1e-3:
            assert row.value == (best == choice.right)
            assert row.about["lead"] == pytest.approx(scores[0] - max(scores[1:]), abs=1e-3)


def test_the_prior_is_the_baselines_and_every_arm_has_it():
    reader, model = tiny.tokenizer(), plain()
    run = tiny.context(model, reader, Arm("small", "knorm", 0.3))
    rows = list(tiny.rows(load("chat.instructions")(lengths=(1400,), samples=1, reply=0), run))
    assert [(row.metric, row.arm) for row in rows] == [("preferred", "full")] * 2 + [
        ("preferred", "small:budget=0.3")
    ] * 2
    assert all(math.isfinite(row.about["lead"]) and row.about["lead"] != 0 for row in rows)
    assert rows[0].about["lead"] != rows[2].about["lead"]
