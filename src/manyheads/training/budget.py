# SPDX-License-Identifier: Apache-2.0
"""How long a training lasts: so many optimiser steps, tokens or seconds."""

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError

__all__ = ["Budget", "Unit"]

Unit = Literal["steps", "tokens", "seconds"]

# Case counts in one letter alone: m is minutes, M is millions.
_UNITS: dict[str, tuple[float, Unit]] = {
    "steps": (1, "steps"), "step": (1, "steps"),
    "": (1, "tokens"), "tokens": (1, "tokens"), "k": (1e3, "tokens"), "K": (1e3, "tokens"), "M": (1e6, "tokens"),
    "B": (1e9, "tokens"),
    "s": (1, "seconds"), "m": (60, "seconds"), "min": (60, "seconds"), "h": (3600, "seconds"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """An ``amount`` above 0 of ``unit``.

    Raises:
        UserError: nothing can be trained with it.
    """

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if not 0 < self.amount < float("inf"):
            raise UserError(f"a budget is above 0, not {self.amount:g} {self.unit}")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """``10m``, ``90s``, ``1.5h`` as time, ``2M``, ``500k``, ``800000`` as tokens, ``700 steps`` as steps.

        Raises:
            UserError: anything else.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)(?:\s+tokens)?", text.strip())
        factor, unit = _UNITS.get(match[2], (0.0, "tokens")) if match else (0.0, "tokens")
        if match is None or not factor or (unit != "tokens" and text.strip().endswith("tokens")):
            raise UserError(
                f"a budget is a time, a number of tokens or of steps, not {text!r}; "
                "write for instance 10m (minutes), 2M (million tokens) or '700 steps'"
            )
        amount = float(match[1]) * factor
        if unit == "steps" and not amount.is_integer():
            raise UserError(f"steps are whole: write {round(amount)} steps instead of {text!r}")
        return cls(amount if unit == "seconds" else int(amount), unit)

    @classmethod
    def of(cls, given: "Budget | str | int") -> "Budget":
        """A budget as it is, text as :meth:`parse` reads it, or a number of steps."""
        if isinstance(given, Budget):
            return given
        return cls.parse(given) if isinstance(given, str) else cls(given, "steps")
