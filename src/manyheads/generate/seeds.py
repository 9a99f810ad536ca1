# SPDX-License-Identifier: Apache-2.0
"""Seeds of what is drawn, as they are given; imports nothing of images or texts."""

from ..errors import UserError

__all__ = ["read_seeds"]


def read_seeds(first: int, several: str | None, samples: int | None) -> list[int]:
    """Seeds: ``several`` as ``0,1,2``, or so many from ``first`` on, or ``first`` alone."""
    if several is None:
        return list(range(first, first + (samples or 1)))
    if samples is not None:
        raise UserError("give --seeds or --samples, not both")
    parts = [part.strip() for part in several.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{several!r} are no seeds; write for instance --seeds 0,1,2")
    return [int(part) for part in parts]
