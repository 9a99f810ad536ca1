# SPDX-License-Identifier: Apache-2.0
"""Tasks on text in which some arms choose by retaining heads that are trained on the subject first, once in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from ...experiment import Arm, CausalLM, RunContext
from ._trained_arms import TrainedArms
from .niah_single import NiahSingle

__all__ = ["RetainingArms", "RetainingNiah"]


@dataclass(frozen=True, kw_only=True)
class RetainingArms(TrainedArms):
    """Base: an arm with the option ``retaining`` gets heads; all such arms share them.

    Attributes:
        answer: last queries of a training sequence that say what counts.
    """

    asks: ClassVar[str] = "retaining"
    takes: ClassVar[str] = "apb"

    lr: float = 1e-3
    answer: int = 128

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "answer": self.answer}

    def train(self, run: RunContext, arm: Arm, seed: int, batches: Callable[[int], Tensor], folder: Path) -> None:
        from ...recipes.apb import train_heads

        model = cast(CausalLM, run.subject).model
        train_heads(model, batches, seed=seed, answer=self.answer, **self.effort(arm)).save(folder)

    def _trained(self, run: RunContext, arm: Arm, seed: int) -> Arm:
        common = dataclasses.replace(arm, name="retaining heads", spec="", budget=None)
        folder = super()._trained(run, common, seed).spec.removeprefix(f"{self.takes}=")
        return dataclasses.replace(arm, spec=f"{arm.spec},scorer=retaining,heads={folder}")


@dataclass(frozen=True, kw_only=True)
class RetainingNiah(RetainingArms, NiahSingle):
    """:class:`NiahSingle`, with heads trained first."""
