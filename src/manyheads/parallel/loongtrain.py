# SPDX-License-Identifier: Apache-2.0
"""LoongTrain (arXiv 2406.18485)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..parallelism import ContextParallelism
from ._context import ContextParallel

if TYPE_CHECKING:
    from . import AttnMask, Layout, World

__all__ = ["LoongTrain"]


@dataclass(frozen=True, kw_only=True)
class LoongTrain(ContextParallelism):
    """Tokens shared by a grid of processes."""

    heads: int = field(default=1, metadata={"help": "processes that share heads among them"})
    window: int | None = field(default=None, metadata={"help": "processes of an inner ring; one ring when not given"})
    place: Literal["head", "context"] = field(default="head", metadata={"help": "what neighbours share"})

    def share(self, world: World, mask: AttnMask, layout: Layout | None = None) -> ContextParallel:
        return ContextParallel(world, mask, layout or "zigzag", "ring", self.heads, self.window, self.place)
