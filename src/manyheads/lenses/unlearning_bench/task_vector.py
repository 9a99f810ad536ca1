# SPDX-License-Identifier: Apache-2.0
"""Task vectors (Ilharco et al., 2212.04089): what training on the facts to be forgotten adds is taken away instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ...errors import UserError
from ...unlearning import Readings, Unlearning
from .losses import answer_nll

__all__ = ["TaskVector"]


@dataclass(frozen=True, kw_only=True)
class TaskVector(Unlearning):
    """``theta_0 - alpha (theta_f - theta_0)``, theta_f from ``L_f`` going down further.

    Attributes:
        alpha: how far the other way.
    """

    alpha: float = field(default=1.0, metadata={"help": "how far the other way"})

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError("unlearning_bench.task_vector: alpha is above 0")

    def terms(self, read: Readings) -> Iterator[Tensor]:
        for concept in read.concepts:
            yield answer_nll(read.forget(concept)) / len(read.concepts)

    def merged(self, before: Tensor, after: Tensor, share: float = 1.0) -> Tensor:
        return before - share * self.alpha * (after - before)
