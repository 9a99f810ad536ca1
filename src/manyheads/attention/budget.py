# SPDX-License-Identifier: Apache-2.0
"""One meaning of *budget* everywhere: a float fraction in (0, 1] of the tokens seen, or a whole number of slots."""

import math
from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import Tensor

from ..errors import UserError

__all__ = ["Budget", "as_budget", "keep_counts", "keep_limit"]

_EPS = 1e-9  # 0.1 * 30 is 3.0000000000000004; without this its ceiling would be 4


def as_budget(value: object) -> int | float:
    """Read a budget: ``"0.5"`` and ``0.5`` are a fraction, ``"64"`` and ``64`` are slots, ``1.0`` keeps everything.

    Raises:
        UserError: not a number, not positive, or a fraction above 1.
    """
    budget: int | float
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"budget must be a fraction in (0, 1] or a whole number of slots, not {value!r}")
    if isinstance(value, str):
        text = value.strip()
        try:
            budget = int(text) if text.lstrip("+-").isdecimal() else float(text)
        except ValueError:
            raise UserError(f"budget must be a fraction in (0, 1] or a whole number of slots, not {value!r}") from None
    else:
        budget = value
    if not math.isfinite(budget) or budget <= 0:
        raise UserError(f"budget must be above 0: got {value}; write 0.5 for half of the tokens or 64 for 64 slots")
    if isinstance(budget, float) and budget > 1:
        raise UserError(f"a fractional budget is at most 1.0: got {value}; write a whole number for slots")
    return budget


Budget = Annotated[int | float, BeforeValidator(as_budget)]


def keep_limit(budget: int | float, seen: int, least: int = 0, whole: int = 0) -> int:
    """Most slots that a row of at most ``seen`` tokens keeps: ``ceil(budget * seen)`` or ``min(budget, seen)``.

    ``least`` tokens are kept whatever their fraction is, and a text of at most ``whole`` tokens is kept whole; what
    comes out is a bound for texts shorter than ``seen``, too.
    """
    if isinstance(budget, int):
        return min(budget, seen)
    return max(math.ceil(budget * seen - _EPS), min(max(least, whole), seen))


def keep_counts(budget: int | float, counts: Tensor, least: int = 0, whole: int = 0) -> Tensor:
    """Slots kept per row, int64, same shape as ``counts`` (tokens seen per row, padding not counted).

    ``least`` and ``whole`` as for :func:`keep_limit`.
    """
    if isinstance(budget, int):
        return counts.clamp(max=budget)
    kept = torch.ceil(counts.double() * budget - _EPS).long().maximum(counts.clamp(max=least))
    return torch.where(counts <= whole, counts, kept)
