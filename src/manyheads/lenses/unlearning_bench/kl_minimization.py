# SPDX-License-Identifier: Apache-2.0
"""KL minimisation: the loss of what is to be forgotten goes up, and of the rest the model says what it said before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...unlearning import Readings, Unlearning
from .losses import answer_nll, kl

__all__ = ["KLMinimization"]


@dataclass(frozen=True, kw_only=True)
class KLMinimization(Unlearning):
    """``- L_f + retain KL(p_0 || p)``, over all words where an answer to be kept is predicted.

    Attributes:
        retain: weight of what is kept.
    """

    refers: ClassVar[bool] = True

    retain: float = field(default=1.0, metadata={"help": "weight of what is kept"})

    def terms(self, read: Readings) -> Iterator[Tensor]:
        for concept in read.concepts:
            yield -answer_nll(read.forget(concept)) / len(read.concepts)
        yield self.retain * kl(read.before("retain"), read.retain())
