# SPDX-License-Identifier: Apache-2.0
"""Every arm tries the same rates on the first seed and is trained with the best on the others."""

import math

import pytest

from manyheads.errors import UserError
from manyheads.training import Diverged, TrainUnit, best_rate, choose_rate, train_arms


def run(losses, rates=(0.1, 0.2, 0.4), seeds=(5, 6, 7)):
    """The units in their order and what came of them, with the loss of an (arm, rate) given."""
    done = []

    def train(unit):
        done.append(unit)
        if losses[unit.arm, unit.rate] is None:
            raise Diverged("the loss is NaN")
        return unit

    return done, train_arms(sorted({arm for arm, _ in losses}), rates, seeds, train, lambda u: losses[u.arm, u.rate])


def test_rates_are_tried_on_the_first_seed_only():
    losses = {("a", 0.1): 3.0, ("a", 0.2): 1.0, ("a", 0.4): None, ("b", 0.1): 1.0, ("b", 0.2): 2.0, ("b", 0.4): 3.0}
    done, (models, chosen) = run(losses)
    assert chosen == {"a": 0.2, "b": 0.1}
    assert models == {arm: [TrainUnit(arm, chosen[arm], seed) for seed in (5, 6, 7)] for arm in ("a", "b")}
    assert len(done) == len(set(done)) == 2 * (3 + 2)  # none trained twice
    flipped, (_, other) = run({(arm, rate): loss and -loss for (arm, rate), loss in losses.items()})
    assert other != chosen and flipped != done


def test_a_single_rate_is_not_judged():
    def loss(model):
        raise AssertionError

    assert choose_rate([0.3], lambda rate: rate, loss) == (0.3, 0.3)


def test_ties_and_what_is_not_finite():
    assert best_rate({0.2: 1.0, 0.1: 1.0, 0.3: 2.0}) == 0.1
    assert best_rate({0.2: math.nan, 0.1: math.inf, 0.3: 2.0}) == 0.3
    with pytest.raises(UserError, match=r"diverges at all rates of 0.2, 0.1"):
        best_rate({0.2: math.nan, 0.1: math.inf})


def test_all_rates_diverging_is_an_error_and_other_errors_pass():
    with pytest.raises(UserError, match="diverges at all"):
        run({("a", 0.1): None, ("a", 0.2): None, ("a", 0.4): None})

    def broken(rate):
        raise UserError("something else")

    with pytest.raises(UserError, match="something else"):
        choose_rate([0.1, 0.2], broken, lambda model: 0.0)
