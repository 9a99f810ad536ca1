# SPDX-License-Identifier: Apache-2.0
"""Gradient difference (Liu et al., 2203.12817): the loss of what is to be forgotten goes up, that of the rest down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ...errors import UserError
from ...unlearning import Readings, Unlearning
from .losses import answer_nll

__all__ = ["GradientDifference"]


@dataclass(frozen=True, kw_only=True)
class GradientDifference(Unlearning):
    """``- forget L_f + retain L_r``; without the first it is plain fine-tuning, without the second gradient ascent.

    Attributes:
        forget, retain: weights of the two.
    """

    forget: float = field(default=1.0, metadata={"help": "weight of what is to be forgotten"})
    retain: float = field(default=1.0, metadata={"help": "weight of what is kept"})

    def __post_init__(self) -> None:
        if min(self.forget, self.retain) < 0 or self.forget + self.retain == 0:
            raise UserError("unlearning_bench.gradient_difference: weights are 0 or more, and not both 0")

    def terms(self, read: Readings) -> Iterator[Tensor]:
        if self.forget:
            for concept in read.concepts:
                yield -self.forget * answer_nll(read.forget(concept)) / len(read.concepts)
        if self.retain:
            yield self.retain * answer_nll(read.retain())
