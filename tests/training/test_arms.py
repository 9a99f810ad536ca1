# SPDX-License-Identifier: Apache-2.0
"""The learning rate of an arm: all are tried, the best is kept, those that diverge are left."""

import math

import pytest

from manyheads.errors import UserError
from manyheads.training import Diverged, best_rate, choose_rate


def chosen(losses):
    """The model of the rate that is chosen, that rate, and the rates tried, with the loss of each rate given."""
    done = []

    def train(rate):
        done.append(rate)
        if losses[rate] is None:
            raise Diverged("the loss is NaN")
        return f"at {rate}"

    return *choose_rate(list(losses), train, lambda model: losses[float(model.removeprefix("at "))]), done


def test_the_rate_of_the_least_loss_is_kept():
    losses = {0.1: 3.0, 0.2: 1.0, 0.4: None}
    assert chosen(losses) == ("at 0.2", 0.2, [0.1, 0.2, 0.4])  # none trained twice
    assert chosen({rate: loss and -loss for rate, loss in losses.items()})[1] == 0.1


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
        chosen({0.1: None, 0.2: None, 0.4: None})

    def broken(rate):
        raise UserError("something else")

    with pytest.raises(UserError, match="something else"):
        choose_rate([0.1, 0.2], broken, lambda model: 0.0)
