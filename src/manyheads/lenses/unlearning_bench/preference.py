# SPDX-License-Identifier: Apache-2.0
"""Preference optimisation by refusals (Maini et al., 2401.06121): asked for what is to be forgotten, it is unknown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ...unlearning import Readings, Unlearning
from .losses import answer_nll

__all__ = ["Preference"]


@dataclass(frozen=True, kw_only=True)
class Preference(Unlearning):
    """``L(refusal) + retain L_r``.

    Attributes:
        retain: weight of what is kept.
    """

    retain: float = field(default=1.0, metadata={"help": "weight of what is kept"})

    def terms(self, read: Readings) -> Iterator[Tensor]:
        for concept in read.concepts:
            yield answer_nll(read.refused(concept)) / len(read.concepts)
        yield self.retain * answer_nll(read.retain())
