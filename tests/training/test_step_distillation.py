# SPDX-License-Identifier: Apache-2.0
"""Trajectory distribution matching: its noise levels, its two losses, and a student that finds the teacher's mean."""

from itertools import pairwise

import pytest
import torch

from manyheads.training import fit
from manyheads.training.step_distillation import Distillation, pseudo_huber, renoised, rollout, to_level
from tolerance import FORMULA, WRONG, assert_close, error

LEVELS = (1.0, 0.7, 0.3, 0.0)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def towards(mean):
    """The velocity of the flow to one point."""
    return lambda x, level, _: (x - mean) / level.clamp(min=1e-3).view(-1, 1)


def test_a_rollout_without_new_noise_is_eulers_and_draws_nothing():
    noise, mean = torch.randn(4, 6, generator=source(), dtype=torch.float64), torch.full((6,), 0.5)
    model = lambda x, level, _: torch.tanh(x) * level.view(-1, 1)  # noqa: E731
    drawn = source(1)
    before = drawn.get_state()
    made = rollout(model, noise, LEVELS, None, 1.0, drawn)
    assert torch.equal(drawn.get_state(), before)
    x = noise
    for high, low in pairwise(LEVELS):
        x = x + (low - high) * model(x, torch.full((4,), high, dtype=torch.float64), None)
    assert_close(made, x, FORMULA)
    other = rollout(model, noise, LEVELS, None, 0.9, source(1))
    assert error(other, made) > 1e-2 and error(other, rollout(model, noise, LEVELS, None, 0.9, source(2))) > 1e-2
    assert_close(rollout(towards(mean), noise, LEVELS, None, 0.9, source()), mean.expand(4, 6), 1e-6)


def test_noise_levels_are_what_they_say():
    x0, eps = torch.zeros(20_000, 1), torch.randn(20_000, 1, generator=source())
    at = renoised(x0, eps, 0.3, 0.9, source(1))
    more = to_level(at, 0.3, torch.full((20_000,), 0.8), source(2))
    for got, level in ((at, 0.3), (more, 0.8)):
        assert abs(got.std().item() / level - 1) < 0.03
    assert abs((at * eps).mean().item() / 0.3 - 0.9) < 0.03  # eta is the share of the old noise
    ones = to_level(torch.ones(20_000, 1) * 0.7, 0.3, torch.full((20_000,), 0.8), source(2))
    assert abs(ones.mean().item() - 0.2) < 0.02  # what is left of the image


def test_pseudo_huber():
    x, y = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([[3.0, 0, 0, 0], [0, 0, 0, 4.0]], dtype=torch.float64)
    want = sum((d**2 + 4e-6) ** 0.5 - 2e-3 for d in (3.0, 4.0)) / 2
    assert_close(pseudo_huber(x, y), torch.tensor(want, dtype=torch.float64), FORMULA)
    assert error(pseudo_huber(x, y), (x - y).square().mean()) > WRONG * FORMULA


class Points(torch.nn.Module):
    """A student and a fake model, each the flow to one learned point."""

    def __init__(self):
        super().__init__()
        self.student, self.fake = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))


@pytest.mark.parametrize("real", [1.0, -0.5])
def test_the_student_finds_what_the_teacher_makes(real):
    model, noise = Points(), source()
    teacher = torch.tensor([real, 0.25])

    def loss(points, batch):
        plan = Distillation(
            student=towards(points.student), fake=towards(points.fake), real=towards(teacher), levels=LEVELS,
            most=100.0,
        )  # fmt: skip
        return plan.losses(batch, None, noise)

    optimizers = [torch.optim.Adam([model.student], lr=0.02), torch.optim.Adam([model.fake], lr=0.05)]
    fit(model, lambda _: torch.randn(16, 2, generator=noise), loss, budget=120, optimizers=optimizers)
    assert (model.student - teacher).abs().max() < 0.1
    assert (model.fake - model.student).abs().max() < 0.1
    assert teacher.abs().max() > 0.2  # where it began


def test_each_loss_trains_its_own_model_and_great_ones_are_skipped():
    model = Points()
    make = lambda most: Distillation(  # noqa: E731
        student=towards(model.student), fake=towards(model.fake), real=towards(torch.ones(2)), levels=LEVELS, most=most
    ).losses(torch.randn(8, 2, generator=source()), None, source(1))
    student, fake = make(1e9)
    assert torch.autograd.grad(student, [model.fake], allow_unused=True)[0] is None
    got = torch.autograd.grad(fake, [model.student, model.fake], allow_unused=True)
    assert got[0] is None and got[1] is not None
    assert next(iter(list(make(0.0))[1:])).item() == 0.0 and fake.item() > 0
