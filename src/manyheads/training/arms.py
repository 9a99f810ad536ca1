# SPDX-License-Identifier: Apache-2.0
"""Equal terms for architectures that are compared by training: the same rates tried by all, the same seeds.

Every arm tries the same learning rates on the first seed, keeps the one with the least loss on what is set aside for
it, and is trained with it on the other seeds. Each (arm, rate, seed) is a unit of work that needs no other, so that
those of one stage may run anywhere and in any order.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import UserError
from .fit import Diverged

__all__ = ["TrainUnit", "best_rate", "choose_rate", "train_arms"]

Arm = TypeVar("Arm", bound=Hashable)
Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class TrainUnit(Generic[Arm]):
    """One training: of an arm, at a learning rate, from a seed."""

    arm: Arm
    rate: float
    seed: int


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the least loss, the lower of two equals.

    Raises:
        UserError: the loss is finite at none.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise UserError(f"training diverges at all rates of {', '.join(map(str, losses))}; give lower ones")
    return min(finite, key=lambda rate: (finite[rate], rate))


def choose_rate(
    rates: Sequence[float], train: Callable[[float], Model], loss: Callable[[Model], float]
) -> tuple[Model, float]:
    """Train at each of ``rates``; the model with the least loss, and its rate. One rate is taken without a look.

    Args:
        rates: to try.
        train: a new model, trained at a rate; a :class:`Diverged` of one rate leaves the others.
        loss: of a model, on what is set aside for tuning.

    Raises:
        UserError: training diverges at every rate.
    """
    if len(rates) == 1:
        return train(rates[0]), rates[0]
    models: dict[float, Model] = {}
    losses = dict.fromkeys(rates, math.inf)
    for rate in rates:
        try:
            models[rate] = train(rate)
        except Diverged:
            continue
        losses[rate] = loss(models[rate])
    best = best_rate(losses)
    return models[best], best


def train_arms(
    arms: Sequence[Arm], rates: Sequence[float], seeds: Sequence[int], train: Callable[[TrainUnit[Arm]], Model],
    loss: Callable[[Model], float],
) -> tuple[dict[Arm, list[Model]], dict[Arm, float]]:  # fmt: skip
    """The models of every arm, one for each seed, and the rate that each arm chose on the first.

    Args:
        arms: what is compared.
        rates: tried by all of them.
        seeds: of the trainings.
        train: a new model, trained; the same for the same unit, whatever ran before.
        loss: of a model, on what is set aside for tuning.
    """
    models: dict[Arm, list[Model]] = {}
    chosen: dict[Arm, float] = {}
    for arm in arms:

        def tune(rate: float, arm: Arm = arm) -> Model:
            return train(TrainUnit(arm, rate, seeds[0]))

        first, chosen[arm] = choose_rate(rates, tune, loss)
        models[arm] = [first, *(train(TrainUnit(arm, chosen[arm], seed)) for seed in seeds[1:])]
    return models, chosen
