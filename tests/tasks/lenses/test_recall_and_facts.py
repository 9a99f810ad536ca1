# SPDX-License-Identifier: Apache-2.0
"""Toys of recall and facts: damage of nothing changes nothing, and facts are learned first."""

from manyheads.experiment import Arm
from manyheads.tasks.lenses.recall_and_facts import RecallAndFacts
from oracles.tasks import context, rows, values

SPEC = "massive_values:damage=top,of=v,by=zero,channels="


def test_every_arm_acts_on_the_model_of_its_seed():
    arms = Arm("full"), Arm("none", f"{SPEC}0"), Arm("all", f"{SPEC}16")
    found = rows(RecallAndFacts(steps=150, questions=128), context(*arms, seeds=(0, 1)))
    assert {row.seed for row in found} == {0, 1} and len(values(found, "answered", "full")) == 256
    assert (values(found, "answered", "none") == values(found, "answered", "full")).all()
    assert values(found, "answered", "full", asks="fact").mean() > 0.8
    assert (values(found, "answered", "all") != values(found, "answered", "full")).any()
