# SPDX-License-Identifier: Apache-2.0
"""Tasks on text in which an arm has attention gates that are trained on the subject first.

An arm whose options name a ``target`` gets gates trained for it, once in a run; what is measured is then
``attention_gate`` with these. ``untrained`` leaves them as they were drawn, with the threshold set as for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from torch import Tensor

from ...experiment import Arm, CausalLM, RunContext
from ._trained_arms import TrainedArms
from .memory import Memory
from .niah_single import NiahSingle
from .perplexity import Perplexity
from .speed import Speed

__all__ = ["GatedMemory", "GatedNiah", "GatedPerplexity", "GatedSpeed"]


@dataclass(frozen=True, kw_only=True)
class _Gated(TrainedArms):
    """Base: puts ``attention_gate`` with its gates in the place of the arms that ask for gates."""

    asks: ClassVar[str] = "target"
    takes: ClassVar[str] = "attention_gate:gates"

    lr: float = 1e-2

    def train(self, run: RunContext, arm: Arm, seed: int, batches: Callable[[int], Tensor], folder: Path) -> None:
        from ...recipes.attention_gate import train_gates

        model, target = cast(CausalLM, run.subject).model, float(arm.options["target"])
        train_gates(model, batches, target=target, seed=seed, **self.effort(arm)).save(folder)


@dataclass(frozen=True, kw_only=True)
class GatedPerplexity(_Gated, Perplexity):
    """:class:`Perplexity`, with gates trained first."""


@dataclass(frozen=True, kw_only=True)
class GatedNiah(_Gated, NiahSingle):
    """:class:`NiahSingle`, with gates trained first."""


@dataclass(frozen=True, kw_only=True)
class GatedMemory(_Gated, Memory):
    """:class:`Memory`, with gates trained first."""


@dataclass(frozen=True, kw_only=True)
class GatedSpeed(_Gated, Speed):
    """:class:`Speed`, with gates trained first."""
