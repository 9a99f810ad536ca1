# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of images stand among those of a text, and positions and masks that follow from it.

An image of H x W patches is a block of H W columns in raster order; a frame of a video is such a block too. A rule
ranks the tokens of a block, and takes ``size`` positions for it:

    position(text)  = text tokens before + sizes of the blocks before
    position(image) = the same + rank

Ranks of the three orders, for the patch of row r and column c:

    raster   r W + c               size H W
    reverse  H W - 1 - (r W + c)   size H W
    ring     min(r, c, H - 1 - r, W - 1 - c)   size ceil(min(H, W) / 2): 0 at the edge, greatest in the centre

Padding is no token: it takes no position and is seen by nothing but itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Block", "ImageLayout", "Order", "block_mask", "block_positions", "ranks"]

Order = Literal["ring", "raster", "reverse"]
Block = tuple[int, int, int, int]  # row of the batch, first column, H, W


@dataclass(frozen=True)
class ImageLayout:
    """What stands in the S columns of each of B rows.

    Attributes:
        real: which columns hold tokens and not padding, bool ``[B, S]``.
        image: number of the image or frame in its row, in order of columns, int64 ``[B, S]``; -1 for text.
        cell: row, column, H and W of a patch, int64 ``[B, S, 4]``; 0 for text.
    """

    real: Tensor
    image: Tensor
    cell: Tensor

    @classmethod
    def of(cls, real: Tensor, blocks: Sequence[Block] = (), before: Tensor | None = None) -> "ImageLayout":
        """From blocks of patches, for new columns ``real [B, S]``.

        Args:
            real: as the attribute.
            blocks: of images, in any order.
            before: images that each row has seen already, ``[B]``; none if None.
        """
        first = torch.zeros(real.shape, dtype=torch.long)
        cell = torch.zeros(*real.shape, 4, dtype=torch.long)
        row, start, height, width = torch.tensor(blocks, dtype=torch.long).reshape(-1, 4).T
        count = height * width
        which = torch.arange(len(count)).repeat_interleave(count)  # block of each patch
        index = torch.arange(len(which)) - (count.cumsum(0) - count)[which]
        patch = [index // width[which], index % width[which], height[which], width[which]]
        cell[row[which], start[which] + index] = torch.stack(patch, 1)
        first[row, start] = 1
        image, cell = (first.cumsum(1) - 1).to(real.device), cell.to(real.device)
        image = image if before is None else image + before[:, None]
        return cls(real, torch.where(cell[..., 2] > 0, image, -1), cell)

    @property
    def visual(self) -> Tensor:
        """Tokens of images, bool ``[B, S]``."""
        return self.image >= 0

    @property
    def ends(self) -> Tensor:
        """The last token of each image, bool ``[B, S]``."""
        row, column, height, width = self.cell.unbind(-1)
        return self.visual & (row == height - 1) & (column == width - 1)

    @property
    def seen(self) -> Tensor:
        """Images that ended before each column, int64 ``[B, S]``: the number of its own image at a patch."""
        return self.ends.long().cumsum(1) - self.ends.long()

    @property
    def images(self) -> Tensor:
        """Images of each row, ``[B]``."""
        return self.ends.sum(1)

    def first(self, count: int) -> "ImageLayout":
        """The first ``count`` columns."""
        return ImageLayout(self.real[:, :count], self.image[:, :count], self.cell[:, :count])

    def followed_by(self, more: "ImageLayout") -> "ImageLayout":
        """These columns and then ``more``."""
        return ImageLayout(
            torch.cat([self.real, more.real], 1), torch.cat([self.image, more.image], 1),
            torch.cat([self.cell, more.cell], 1),
        )  # fmt: skip


def ranks(layout: ImageLayout, order: Order) -> tuple[Tensor, Tensor]:
    """Rank of each patch in its image, and positions that the image takes: int64 ``[B, S]`` each, 0 for text."""
    row, column, height, width = layout.cell.unbind(-1)
    if order == "ring":
        rank = torch.stack([row, column, height - 1 - row, width - 1 - column]).amin(0).clamp(min=0)
        return rank, (torch.minimum(height, width) + 1) // 2
    raster, size = row * width + column, height * width
    return raster if order == "raster" else (size - 1 - raster).clamp(min=0), size


def block_positions(layout: ImageLayout, rank: Tensor, size: Tensor) -> Tensor:
    """Positions int64 ``[B, S]`` by the ranks and sizes of images; 0 for padding."""
    step = torch.where(layout.visual, torch.where(layout.ends, size, 0), layout.real.long())
    position = step.cumsum(1) - step + torch.where(layout.visual, rank, 0)
    return torch.where(layout.real, position, 0)


def block_mask(layout: ImageLayout, queries: int, rank: Tensor) -> Tensor:
    """Who sees whom: the past, and within an image what has no higher rank; bool ``[B, queries, S]``.

    Args:
        layout: of all S columns.
        queries: the last so many of them.
        rank: of patches, ``[B, S]``; equal ranks see each other.
    """
    image, columns = layout.image, torch.arange(layout.real.shape[1], device=layout.real.device)
    mine = columns[-queries:] if queries else columns[:0]
    same = (image[:, mine, None] == image[:, None]) & layout.visual[:, None]
    ordered = rank[:, None] <= rank[:, mine, None]
    allowed = torch.where(same, ordered, columns <= mine[:, None]) & layout.real[:, None]
    return allowed | (columns == mine[:, None])
