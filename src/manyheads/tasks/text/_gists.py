# SPDX-License-Identifier: Apache-2.0
"""Tasks on text in which an arm has gists that are trained on the subject first.

An arm whose options name a ``ratio`` gets gists trained for it: ``granularity``, ``ae`` and ``tie`` as there, all else
as the task says; ``untrained`` leaves them as they were at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from ...experiment import Arm, CausalLM, RunContext
from ._trained_arms import TrainedArms
from .boundary_loss import BoundaryLoss
from .exact_string import ExactString
from .memory import Memory
from .niah_single import NiahSingle
from .perplexity import Perplexity
from .recitation import Recitation

__all__ = ["GistBoundary", "GistMemory", "GistNiah", "GistPerplexity", "GistRecitation", "GistString"]


@dataclass(frozen=True, kw_only=True)
class _Gisted(TrainedArms):
    """Base: puts ``gist`` with its gists in the place of the arms that ask for gists.

    Attributes:
        segment: tokens of a segment.
    """

    asks: ClassVar[str] = "ratio"
    takes: ClassVar[str] = "gist:gists"

    segment: int = 64

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "segment": self.segment}

    def train(self, run: RunContext, arm: Arm, seed: int, batches: Callable[[int], Tensor], folder: Path) -> None:
        from ...caches.gist import Segments
        from ...recipes.gist import train_gists

        options = arm.options
        segments = Segments(
            length=self.segment, ratio=int(options["ratio"]), granularity=options.get("granularity", "fine")
        )  # fmt: skip
        train_gists(
            cast(CausalLM, run.subject).model, batches, segments=segments, ae=float(options.get("ae", 0.0)),
            tie=bool(options.get("tie")), replayed=run.device.type == "cuda", seed=seed, **self.effort(arm),
        ).save(folder)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GistPerplexity(_Gisted, Perplexity):
    """:class:`Perplexity`, with gists trained first."""


@dataclass(frozen=True, kw_only=True)
class GistNiah(_Gisted, NiahSingle):
    """:class:`NiahSingle`, with gists trained first."""


@dataclass(frozen=True, kw_only=True)
class GistRecitation(_Gisted, Recitation):
    """:class:`Recitation`, with gists trained first."""


@dataclass(frozen=True, kw_only=True)
class GistString(_Gisted, ExactString):
    """:class:`ExactString`, with gists trained first."""


@dataclass(frozen=True, kw_only=True)
class GistBoundary(_Gisted, BoundaryLoss):
    """:class:`BoundaryLoss`, with gists trained first."""


@dataclass(frozen=True, kw_only=True)
class GistMemory(_Gisted, Memory):
    """:class:`Memory`, with gists trained first."""
