# SPDX-License-Identifier: Apache-2.0
"""Sizes of an experiment: values for all tasks that have the field, and for one of them."""

from dataclasses import replace

import pytest

from manyheads.errors import UserError
from oracles.experiment import Draws, experiment


def test_a_size_may_be_of_one_task_alone():
    both = replace(
        experiment(cpu={"samples": 24, "other.samples": 6}), tasks=(Draws(label="one"), Draws(label="other"))
    )
    assert [(task.key, task.samples) for task in both.at("cpu").tasks] == [("one", 24), ("other", 6)]
    for wrong in ("third.samples", "other.nothing", "nothing"):
        with pytest.raises(UserError, match=wrong):
            replace(both, sizes=replace(both.sizes, cpu={wrong: 1})).at("cpu")
