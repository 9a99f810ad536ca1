# SPDX-License-Identifier: Apache-2.0
"""Runs one task in this process, and reads its rows."""

import numpy as np
import torch

from manyheads.experiment import Arm, RunContext, Trainable


def context(*arms, subject=None, seeds=(0,)):
    """The baseline is ``full`` where no arm is given."""
    subject = subject or Trainable()
    subject.load("cpu")
    return RunContext(subject, arms or (Arm("full"),), seeds=seeds, device=torch.device("cpu"))


def rows(task, run):
    """All rows; what the task says of its progress adds up to the cost of each unit, or it says nothing."""
    found = []
    for unit in task.units(run):
        told = []
        run.advance = told.append
        found += task.measure(run, unit)
        trains = hasattr(task, "steps") and hasattr(task, "trained_arms")  # a part of it, every few steps
        assert sum(told) <= unit.cost * (1 + 1e-9) and (trains or not told or sum(told) > unit.cost * (1 - 1e-9)), unit
    return found


def values(rows, metric, arm=None, /, **at):
    """Of the rows that fit, in their order."""
    found = [
        row.value
        for row in rows
        if row.metric == metric and arm in (None, row.arm) and all(row.at.get(k) == v for k, v in at.items())
    ]
    assert found, f"no row of {metric}"
    return np.array(found)
