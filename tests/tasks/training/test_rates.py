# SPDX-License-Identifier: Apache-2.0
"""The learning rate of an arm: all are tried on the first seed, the best is kept, those that diverge are left."""

import math
from types import SimpleNamespace

import pytest

from manyheads.errors import UserError
from manyheads.tasks.training._training_task import Training, best_rate
from manyheads.tasks.training.byte_lm import ByteLM
from manyheads.training import Diverged

from .conftest import SOFTMAX, TEXT, context


@pytest.fixture
def tuned(monkeypatch):
    """Losses by rate as they were found, the rate whose model was kept, and the rates tried, of losses by rate."""

    def of(losses, **more):
        kept, done = [], []

        def train(self, seed, rate, steps):
            done.append((seed, rate, steps))
            if losses[rate] is None:
                raise Diverged("the loss is NaN")
            return SimpleNamespace(model=rate, rate=rate)

        monkeypatch.setattr(Training, "_train", train)
        monkeypatch.setattr(Training, "_keep", lambda self, seed, trained: kept.append(trained.rate))
        monkeypatch.setattr(ByteLM, "validation", lambda self, run, model: losses[model])
        task = ByteLM(**{**TEXT, "rates": tuple(losses)}, **more)
        return Training(task, context([]), SOFTMAX).tuned(), kept, done

    return of


def test_the_model_of_the_least_loss_is_kept(tuned):
    losses, kept, done = tuned({0.1: 3.0, 0.2: 1.0, 0.4: None, 0.5: 2.0})
    assert losses == {0.1: 3.0, 0.2: 1.0, 0.4: math.inf, 0.5: 2.0} and kept == [0.2]
    assert done == [(0, rate, TEXT["steps"]) for rate in losses]  # none trained twice
    assert tuned({0.1: -3.0, 0.2: -1.0, 0.4: None, 0.5: -2.0})[1] == [0.1]
    assert tuned({0.1: 2.0, 0.2: 1.0}, tune_steps=3)[1:] == ([], [(0, 0.1, 3), (0, 0.2, 3)])  # too short to keep


def test_a_single_rate_is_not_judged(tuned):
    assert tuned({0.3: 1.0}) == ({}, [], [])


def test_ties_and_what_is_not_finite():
    assert best_rate({0.2: 1.0, 0.1: 1.0, 0.3: 2.0}) == 0.1
    assert best_rate({0.2: math.nan, 0.1: math.inf, 0.3: 2.0}) == 0.3
    with pytest.raises(UserError, match=r"diverges at all rates of 0.2, 0.1"):
        best_rate({0.2: math.nan, 0.1: math.inf})


def test_all_rates_diverging_is_an_error(tuned):
    with pytest.raises(UserError, match="diverges at all"):
        tuned({0.1: None, 0.2: None})
