# SPDX-License-Identifier: Apache-2.0
"""Recall of pairs: all by the full cache, few by one that forgets, and what was asked is what was given."""

import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import CausalLM, Experiment, over, run
from manyheads.experiment.runner import context
from manyheads.tasks.text.pair_recall import PairRecall
from tolerance import nearly


def recalled(folder, task):
    plan = Experiment(subject=CausalLM("recall"), arms=over(["random:schedule=step"], (0.2,)), tasks=(task,)).at("cpu")
    found = {}
    for row in run(plan, folder).rows:
        found.setdefault(row.arm.split(":")[0], []).append(row.value)
    return {arm: sum(values) / len(values) for arm, values in found.items()}


@pytest.mark.parametrize(
    "options", [{}, {"start": 32, "piece": 32}, {"asked": 40, "others": 60, "distinct": 4, "known": 16}], ids=str
)
def test_only_what_is_kept_is_recalled(tmp_path, options):
    found = recalled(tmp_path, PairRecall(sequences=8, **options))
    assert found["full"] > 0.95
    assert found["random"] < 0.6


def test_pairs_are_asked_as_they_were_given():
    task = PairRecall(asked=40, others=60, distinct=4, sequences=2)
    plan = Experiment(subject=CausalLM("recall"), arms=(), tasks=(task,)).at("cpu")
    given, asked = task._drawn(context(plan, 0, "cpu", None), 0, 2)
    for row in range(2):
        pairs = [tuple(pair) for pair in given[row].view(-1, 2).tolist()]
        questions = {tuple(pair) for pair in asked[row].view(-1, 2).tolist()}
        assert len(pairs) == 100 and len(questions) == 40 and questions < set(pairs) and len(set(pairs)) == 44


@pytest.mark.parametrize("options", [{"asked": 90, "others": 20}, {"known": 3}, {"piece": 1}, {"start": 999}], ids=str)
def test_what_the_fixture_cannot_do_is_refused(options):
    with pytest.raises(UserError):
        PairRecall(**options)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"asked": 1}, {"asked": 0}), ({"asked": 60, "others": 40}, {"asked": 60, "others": 41}),
        ({"asked": 100}, {"asked": 101}), ({"asked": 5, "known": 8}, {"asked": 5, "known": 10}), ({}, {"known": -2}),
        ({"piece": 2}, {"piece": 0}), ({"piece": 4}, {"piece": 3}), ({"start": 200}, {"start": 201}),
        ({"start": 0}, {"start": -1}), ({}, {"others": -1}),
        ({"asked": 50, "others": 9, "distinct": 9}, {"asked": 50, "others": 9, "distinct": 10}),
        ({"asked": 50, "others": 9, "distinct": 0}, {"asked": 50, "others": 9, "distinct": -1}),
    ],
)  # fmt: skip
def test_the_ends_of_what_it_can_do(good, bad):
    assert PairRecall(**good)
    with pytest.raises(UserError):
        PairRecall(**bad)


@pytest.mark.parametrize(
    "options", [{}, {"known": 4}, {"start": 10, "piece": 6}, {"others": 20, "distinct": 3}], ids=str
)
def test_values_are_recalled_by_the_plain_model(options):
    """One sequence and one forward at a time, without a cache: the likeliest token behind each key that is judged."""
    task = PairRecall(sequences=3, **{"asked": 30, **options})
    plan = Experiment(subject=CausalLM("recall"), arms=(), tasks=(task,)).at("cpu")
    run = context(plan, 3, "cpu", None)
    run.subject.load("cpu")
    told = []
    run.advance = told.append
    (unit,) = task.units(run)
    found = list(task.measure(run, unit))
    assert sum(told) == nearly(unit.cost) == nearly(3 * 4 * (30 + task.others) / 50)
    given, asked = task._drawn(run, 0, 3)
    model = run.subject.model
    for row in found:
        i, right = int(row.sample), []
        for at in range(task.known, 60, 2):
            ids = torch.cat([given[i], asked[i, : at + 1]])
            with torch.no_grad():
                right.append(float(model(ids[None]).logits[0, -1].argmax() == asked[i, at + 1]))
        assert row.value == nearly(sum(right) / len(right), torch.float32) and len(right) == 30 - task.known // 2
        assert row.bytes > 0
    assert len(found) == 3 and [unit.params for unit in PairRecall(sequences=130).units(run)] == [
        {"first": a, "last": b} for a, b in ((0, 64), (64, 128), (128, 130))
    ]
