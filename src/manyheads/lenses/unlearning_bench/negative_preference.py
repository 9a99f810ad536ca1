# SPDX-License-Identifier: Apache-2.0
"""Negative preference optimisation (Zhang et al., 2404.05868): gradient ascent that ends by itself.

Its gradient is that of ascent times ``2 p^beta / (p^beta + p_0^beta)``, 1 at first, and 0 where p has gone to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...errors import UserError
from ...unlearning import Readings, Unlearning
from .losses import answer_nll, npo

__all__ = ["NegativePreference"]


@dataclass(frozen=True, kw_only=True)
class NegativePreference(Unlearning):
    """``- 2/beta E log sigmoid(- beta log p / p_0) + retain L_r``; gradient difference as beta goes to 0.

    Attributes:
        beta: how soon it ends.
        retain: weight of what is kept.
    """

    refers: ClassVar[bool] = True

    beta: float = field(default=0.1, metadata={"help": "how soon ascent ends; 0 never"})
    retain: float = field(default=1.0, metadata={"help": "weight of what is kept"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("unlearning_bench.negative_preference: beta is above 0")

    def terms(self, read: Readings) -> Iterator[Tensor]:
        for concept in read.concepts:
            yield npo(read.before(concept), read.forget(concept), self.beta) / len(read.concepts)
        yield self.retain * answer_nll(read.retain())
