# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent: the loss of what is to be forgotten goes up, and nothing holds what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ...unlearning import Readings, Unlearning
from .losses import answer_nll

__all__ = ["GradientAscent"]


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Unlearning):
    """``- L_f``, the mean over the concepts."""

    def terms(self, read: Readings) -> Iterator[Tensor]:
        for concept in read.concepts:
            yield -answer_nll(read.forget(concept)) / len(read.concepts)
