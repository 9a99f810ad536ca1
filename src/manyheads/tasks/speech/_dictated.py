# SPDX-License-Identifier: Apache-2.0
"""The strings of digits of :mod:`.digit_strings`, for tasks that are learned otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError
from ...recipe import Batch, Part, Sample
from .._field import FieldTask
from .digit_strings import DigitStrings, drawn_strings, fixed_strings

__all__ = ["LONGEST", "DictatedData"]

LONGEST = 32  # digits of a string


@dataclass(frozen=True, kw_only=True)
class DictatedData(FieldTask):
    """Strings of digits.

    Attributes:
        digits: words of a string.
        stretch: how much faster or slower a word may be read in training, as a share.
    """

    digits: int = 4
    stretch: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.digits <= LONGEST or not 0 <= self.stretch < 1:
            raise UserError(f"digits count, 1 to {LONGEST}; stretch is a share below 1")

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        return DigitStrings.read(folder)

    @classmethod
    def open(cls, path: Path) -> Sample:
        return DigitStrings.open(path)

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        return self.drawn(rng, samples, self.batch)

    def drawn(self, rng: np.random.Generator, samples: Sequence[Sample], count: int) -> Sequence[Sample]:
        """As many strings of one to ``digits`` words."""
        return drawn_strings(rng, samples, count, self.digits, self.stretch)

    def judged(self, part: Part) -> Sequence[Sample]:
        return fixed_strings(self.samples(part), part, self.digits)[: self.samples_judged]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return DigitStrings().collate(samples)
