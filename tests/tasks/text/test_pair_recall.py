# SPDX-License-Identifier: Apache-2.0
"""Recall of pairs: all by the full cache, few by one that forgets, and what was asked is what was given."""

import pytest

from manyheads.errors import UserError
from manyheads.experiment import CausalLM, Experiment, over, run
from manyheads.experiment.runner import context
from manyheads.tasks.text.pair_recall import PairRecall


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
