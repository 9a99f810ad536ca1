# SPDX-License-Identifier: Apache-2.0
"""Equal terms for architectures that are compared by training: every arm tries the same learning rates and keeps the
one with the least loss on what is set aside for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ..errors import UserError
from .fit import Diverged

__all__ = ["best_rate", "choose_rate"]

Model = TypeVar("Model")


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
