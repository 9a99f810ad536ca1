# SPDX-License-Identifier: Apache-2.0
"""Plain ways to give a decoder fewer tokens of an image: what reduction between tower and decoder has to beat.

``mean`` averages ``cell x cell`` features behind the projector (average pooling), ``first`` keeps one of them
(downsampling), ``random`` as many tokens at random, alike for all images, and ``similar`` merges as many by likeness:
ToMe's bipartite matching of features, over and over until so few are left. Shapes: features ``[N, V, D]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.grid_merging import pooled_cells
from ..attention.merging import Grouping, matched
from ..call import AttentionCall
from ..errors import UserError
from ..reducing import ImageReducer

__all__ = ["FeaturePool"]


@dataclass(frozen=True, kw_only=True)
class FeaturePool(ImageReducer):
    """As many tokens as an image has cells.

    Attributes:
        how: ``mean``, ``first``, ``random`` or ``similar``.
        cell: tokens of a cell's side.
        seed: of ``random``.
    """

    how: Literal["mean", "first", "random", "similar"] = field(default="mean", metadata={"help": "what stays"})
    cell: int = field(default=2, metadata={"help": "tokens of a cell's side"})
    seed: int = field(default=0, metadata={"help": "of how=random"})

    def __post_init__(self) -> None:
        if self.cell < 1:
            raise UserError(f"{self.slug}: a cell has at least 1 token on a side, not {self.cell}")

    def edit(self, call: AttentionCall) -> AttentionCall:
        return call

    def group(self, features: Tensor, grid: tuple[int, int], seen: Sequence[dict[str, Any]]) -> tuple[Grouping, Tensor]:
        images, count, _ = features.shape
        cells = pooled_cells(images, grid, self.cell, features.device)
        ones = torch.ones(images, count, device=features.device)
        if self.how == "mean":
            return cells, ones
        if self.how == "similar":
            return _merged(features, cells.count), ones
        if self.how == "random":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).to(features.device)
            chosen = order[: cells.count].expand(images, -1)
        else:
            first = torch.arange(count, device=features.device).expand(images, -1)
            chosen = torch.full((images, cells.count), count, device=features.device)
            chosen = chosen.scatter_reduce(1, cells.into, first, "amin")
        into = torch.full((images, count), cells.count, dtype=torch.long, device=features.device)
        numbers = torch.arange(cells.count, device=features.device).expand(images, -1)
        return Grouping(into.scatter(1, chosen, numbers), cells.count), ones


def _merged(features: Tensor, target: int) -> Grouping:
    """Matchings one after the other, each of means of the groups so far, until ``target`` groups are left."""
    images, count, _ = features.shape
    device = features.device
    whole = Grouping(torch.arange(count, device=device).expand(images, -1), count)
    ones = torch.ones(images, count, device=device)
    while whole.count > target:
        now, left = whole.count, max(target, whole.count - whole.count // 2)
        real = torch.ones(images, now, dtype=torch.bool, device=device)
        kept = torch.full((images,), left, device=device)
        whole = whole.then(matched(whole.reduce(features, ones), real, kept, left))
    return whole
