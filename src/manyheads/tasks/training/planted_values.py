# SPDX-License-Identifier: Apache-2.0
"""Values, each of a kind of its own, anywhere among filler; at the end every kind is asked for once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...data.synthetic import planted_values
from ...experiment.task import RunContext
from .associative_recall import AssociativeRecall

__all__ = ["PlantedValues"]


@dataclass(frozen=True, kw_only=True)
class PlantedValues(AssociativeRecall):
    """Associative recall whose values say what they belong to: a small model learns it soon, at any distance.

    Longer sequences have more filler. What a guess among the values of a kind reaches lies below the floor.

    Attributes:
        pairs: kinds, each asked for once.
        tokens: kinds of filler.
        values: of every kind.
    """

    tokens: int = 24
    values: int = 8

    @property
    def vocab(self) -> int:
        return self.tokens + self.pairs * (1 + self.values)

    def training_fields(self) -> Sequence[str]:
        return (*super().training_fields(), "values")

    def _drawn(self, run: RunContext, count: int, times: int, **axes: str | int) -> tuple[Tensor, Tensor]:
        generator = run.torch_rng(planted=self.pairs, times=times, **axes)
        return planted_values(count, times * self.length, self.tokens, self.pairs, self.values, generator)
