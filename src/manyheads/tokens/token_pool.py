# SPDX-License-Identifier: Apache-2.0
"""Tokens of each cell of a grid become one, whatever they are: the plain ways that token reduction has to beat.

``mean`` averages a cell (average pooling), ``first`` keeps its upper left token (downsampling), ``random`` keeps one at
random, drawn by place and seed alike for all images. At the output of the blocks that ``layers`` names, by default of
the first; all blocks behind see fewer tokens, and the end restores them: a copy of its cell's token to each, or with
``restore=change`` what has changed of it since. A class token and registers stay. Shapes: hidden states ``[B, N, C]``.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention.grid_merging import behind, pooled_cells
from ..attention.merging import Grouping
from ..errors import UserError
from ..reducing import Layout, Reduction, StreamReducer
from ..strategy import Layers

__all__ = ["TokenPool"]


@dataclass(frozen=True, kw_only=True)
class TokenPool(StreamReducer):
    """One token for each cell.

    Attributes:
        layers: blocks at whose outputs that happens.
        how: ``mean``, ``first`` or ``random``.
        cell: tokens of a cell's side.
        across: tokens of a cell's width, where that is another than its height.
        proportional: a token weighs as many as its cell has.
        restore: every token is given a ``copy`` of its cell's, or the ``change`` of that.
        seed: of ``random``.
    """

    layers: Layers = field(default=(0,), metadata={"help": "blocks at whose outputs tokens are pooled"})
    how: Literal["mean", "first", "random"] = field(default="mean", metadata={"help": "what becomes of a cell"})
    cell: int = field(default=2, metadata={"help": "tokens of a cell's side"})
    across: int = field(default=0, metadata={"help": "tokens of a cell's width; 0 for as many as of its height"})
    proportional: bool = field(default=False, metadata={"help": "a token weighs as many as its cell has"})
    restore: Literal["copy", "change"] = field(default="copy", metadata={"help": "what every token is given back"})
    seed: int = field(default=0, metadata={"help": "of how=random"})

    def __post_init__(self) -> None:
        if self.cell < 2 or self.across < 0:
            raise UserError(f"{self.slug}: a cell has at least 2 tokens on a side, not {self.cell} and {self.across}")

    def reduce(self, x: Tensor, layout: Layout) -> Reduction | None:
        height, width = layout.patches(self.spec)
        across = self.across or self.cell
        if layout.frames > 1 and height // layout.frames % self.cell:
            raise UserError(
                f"{self.spec}: {height // layout.frames} rows of a frame do not part into cells; give cell="
            )
        grouping = pooled_cells(len(x), (height, width), self.cell, x.device, across=across)
        weights = None if self.how == "mean" else _one_of_each(grouping, self.how == "random", self.seed, x)
        grid = -(height // -self.cell), -(width // -across)
        if weights is not None:
            weights = torch.cat([weights.new_ones(len(x), layout.prefix), weights], 1)
        whole = behind(layout.prefix, grouping)
        return Reduction.of(
            whole, layout, x, weights=weights, grid=grid, change_of=x if self.restore == "change" else None
        )


def _one_of_each(grouping: Grouping, random: bool, seed: int, x: Tensor) -> Tensor:
    """``[B, N]``, 1 for one token of each group and 0 for the others: the first, or one at random."""
    into, count = grouping.into[0].cpu(), grouping.into.shape[1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator) if random else torch.arange(count)
    first = torch.full((grouping.count,), count)
    place = torch.empty(count, dtype=torch.long)
    place[order] = torch.arange(count)
    first.scatter_reduce_(0, into, place, "amin")
    return (first[into] == place).to(x).expand(len(x), -1)
