# SPDX-License-Identifier: Apache-2.0
"""Errors of alignments by the length of the source: rows of arms that have one, at the same draws."""

import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.tasks.language.expected_alignment import ExpectedAlignment, recursion
from oracles import tasks


def test_rows():
    arms = (Arm("offline", "wait_k:k=0"), Arm("scan", "emma"), Arm("mma", "emma:alignment=mma"), Arm("reference"))
    run = RunContext(Trainable(), arms, device=torch.device("cpu"))
    task = ExpectedAlignment(lengths=(10, 100), draws=3)
    rows = tasks.rows(task, run)
    assert {row.arm for row in rows} == {"scan", "mma"} and len(rows) == 2 * 2 * 2 * 3
    found = {(row.arm, row.metric, row.at["length"], row.sample): row.value for row in rows}
    for length in (10, 100):
        name = f"{length} positions, draw 1"
        assert found["scan", "error", length, name] < 1e-6
    assert found["mma", "error", 100, name] > 0.05
    assert found["scan", "mass", 100, name] == pytest.approx(1, abs=1e-5) and found["mma", "mass", 100, name] < 0.5
    assert {row.arm for row in tasks.rows(ExpectedAlignment(lengths=(10,), draws=1, only=("mma",)), run)} == {"mma"}
    with pytest.raises(UserError, match="1 or more"):
        ExpectedAlignment(draws=0)


def test_the_definition_by_hand():
    p = torch.tensor([[0.5, 0.25], [1.0, 0.5]], dtype=torch.float64)
    assert recursion(p).tolist() == [[0.5, 0.125], [0.5, 0.0625]]
