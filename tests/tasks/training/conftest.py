# SPDX-License-Identifier: Apache-2.0
"""Runs of training tasks so small that they take seconds, on a few files of the standard library."""

import pytest
import torch

from manyheads.data.texts import standard_library
from manyheads.experiment import Arm, Experiment, RunContext, Trainable, run

MODEL = {"dim": 16, "layers": 1, "heads": 2}
TEXT = {**MODEL, "length": 32, "batch": 4, "steps": 8, "samples": 4, "rates": (3e-3, 1e-2)}
SOFTMAX = Arm("softmax", "softmax")


@pytest.fixture(scope="session")
def texts():
    return standard_library()[:30]


@pytest.fixture
def measured(texts, tmp_path):
    """Rows of tasks for arms, the first of which is the baseline."""

    def measure(*tasks, arms=(SOFTMAX,), seeds=1, out=tmp_path / "run", data=None, **more):
        experiment = Experiment(
            subject="trainable", arms=tuple(arms), baseline=arms[0], tasks=tasks, equal="parameters", seeds=seeds
        )
        return run(experiment.at("cpu"), out, data={"texts": texts, **(data or {})}, **more)

    return measure


class Knows:
    """Stands for a model: the likeliest next token is that of the row of ``whole [N, T + 1]`` which it reads."""

    def __init__(self, whole, vocab):
        self.whole, self.vocab = whole, vocab

    def __call__(self, ids):
        rows = [next(row for row in self.whole if torch.equal(row[: ids.shape[1]], read)) for read in ids]
        following = torch.stack([row[1 : ids.shape[1] + 1] for row in rows])
        return 30.0 * torch.nn.functional.one_hot(following, self.vocab), None


def context(texts, folder=None):
    """What a task is given that is called by itself."""
    return RunContext(Trainable(), (SOFTMAX,), data={"texts": texts}, folder=folder)


def values(results, metric, arm=None):
    """Values of a metric without what a clock says."""
    return [
        (row.arm, row.sample, row.seed, dict(row.at), row.value)
        for row in results.rows
        if row.metric == metric and arm in (None, row.arm)
    ]
