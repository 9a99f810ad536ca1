# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: the share of the highest rate at which the next step is taken."""

import math
from collections.abc import Callable
from typing import Literal, Protocol

from .budget import Budget

__all__ = ["Position", "Schedule", "decay"]


class Position(Protocol):
    """Where a training is: ``step`` steps done, and ``position`` of its budget's amount spent."""

    step: int
    budget: Budget

    @property
    def position(self) -> float: ...


Schedule = Callable[[Position], float]


def decay(
    kind: Literal["none", "linear", "cosine"] = "cosine", *, warmup: int | float = 0, hold: float = 0.0,
    floor: float = 0.0,
) -> Schedule:  # fmt: skip
    """A rise in a straight line, and a fall to ``floor``.

    Args:
        kind: of the fall: none, in a straight line, or half a cosine.
        warmup: an int is a number of steps of the rise, over which the fall, which spans the whole budget, is laid; a
            float is a share of the budget, at the end of which the fall begins.
        hold: share of the budget before a linear fall.
        floor: share of the rate that is left at the end.

    Returns:
        Given where training is, the factor of the highest rate.
    """

    def factor(at: Position) -> float:
        spent, total = at.position, at.budget.amount
        if isinstance(warmup, int):
            return min(1.0, (at.step + 1) / max(1, warmup)) * fall(spent, total)
        rise = warmup * total
        if at.budget.unit == "steps":  # whole ones, of which the first has a rate above 0
            rise = max(1, round(rise))
            return (spent + 1) / rise if spent < rise else fall(spent - rise, max(1, total - rise))
        return spent / rise if spent < rise else fall(spent - rise, total - rise)

    def fall(spent: float, total: float) -> float:
        if kind == "cosine":
            return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * spent / total))
        if kind == "linear":
            return floor + (1 - floor) * min(1.0, max(0.0, (1 - spent / total) / (1 - hold)))
        return 1.0

    return factor
