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
    return [row for unit in task.units(run) for row in task.measure(run, unit)]


def values(rows, metric, arm=None, /, **at):
    """Of the rows that fit, in their order."""
    found = [
        row.value
        for row in rows
        if row.metric == metric and arm in (None, row.arm) and all(row.at.get(k) == v for k, v in at.items())
    ]
    assert found, f"no row of {metric}"
    return np.array(found)
