# SPDX-License-Identifier: Apache-2.0
"""Schedules are those of torch's schedulers and of the formulas that they replace."""

import math

import torch

from manyheads.training import Budget, TrainState, decay
from tolerance import nearly


def at(step, total, unit="steps"):
    state = TrainState(Budget(total, unit), step=step)
    state.tokens, state.seconds = step, float(step)
    return state


def test_share_of_the_steps_as_warm_up_then_half_a_cosine_to_a_tenth():
    schedule = decay("cosine", warmup=0.1, floor=0.1)
    for steps in (1, 7, 40):
        rise = max(1, round(0.1 * steps))
        for step in range(steps):
            wanted = (step + 1) / rise
            if step >= rise:
                wanted = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
            assert schedule(at(step, steps)) == wanted
    assert decay("cosine", warmup=0.2, floor=0.1)(at(5, 40)) != schedule(at(5, 40))


def test_cosine_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0.2)
    for step in range(30):
        assert decay("cosine", floor=0.2)(at(step, 30)) == nearly(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_linear_holds_then_falls_to_zero():
    schedule = decay("linear", hold=0.25)
    assert [schedule(at(s, 16)) for s in (0, 4, 10, 16, 19)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert decay("linear", floor=0.1)(at(8, 16)) == nearly(0.55)


def test_steps_of_warm_up_are_laid_over_the_fall():
    assert [decay("none", warmup=4)(at(s, 100)) for s in (0, 1, 3, 50)] == [0.25, 0.5, 1.0, 1.0]
    assert decay("linear", warmup=4)(at(1, 100)) == 0.5 * 0.99


def test_tokens_and_seconds_are_followed_where_steps_are_not_known():
    for unit in ("tokens", "seconds"):
        schedule = decay("cosine", warmup=0.1)
        assert schedule(at(0, 50, unit)) == 0 and schedule(at(5, 50, unit)) == 1
        assert schedule(at(27.5, 50, unit)) == nearly(0.5) and schedule(at(50, 50, unit)) == 0
