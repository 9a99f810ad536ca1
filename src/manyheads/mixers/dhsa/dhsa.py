# SPDX-License-Identifier: Apache-2.0
"""The strategy: chunks by prefix sums, their scores, and the tokens of the best."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...attention.reference import widened
from ...errors import UserError
from .._sparse import Row, Spans, SparseAttention, grouped
from .boundaries import Boundaries, cut

__all__ = ["DHSA", "Norm", "chunk_scores", "even"]

Norm = Literal["sqrt", "mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class DHSA(SparseAttention):
    """Read the tokens of the chunks whose mean key, times the root of their length, matches the block of queries.

    Attributes:
        chunk: tokens of a chunk where no boundaries are given.
        boundaries: folder of a predictor, as ``fit_boundaries(...).save`` wrote it, or the name of one that ships:
            ``smollm2-135m-instruct``.
        segment: of its boundaries ``top`` takes the ``per_block`` best for each block of queries, ``threshold`` those
            over ``theta``.
        per_block: boundaries for so many keys as a block has queries.
        theta: ratio of attention of the two sides from which a place is a boundary.
        nms: least distance between two boundaries, tokens.
        norm: of a chunk's sum: by the ``sqrt`` of its length, or for comparison by the length (``mean``) or not
            (``sum``).
    """

    chunk: int = field(default=32, metadata={"help": "tokens of a chunk where no boundaries are given"})
    boundaries: str = field(default="", metadata={"help": "folder of a predictor that fit_boundaries(...).save wrote"})
    segment: Literal["top", "threshold"] = field(default="top", metadata={"help": "best boundaries, or all over theta"})
    per_block: int = field(default=8, metadata={"help": "boundaries for each block of queries, with segment=top"})
    theta: float = field(default=1.1, metadata={"help": "ratio of attention on either side of a boundary"})
    nms: int = field(default=8, metadata={"help": "least distance between two boundaries, tokens"})
    norm: Norm = field(default="sqrt", metadata={"help": "of a chunk's sum of keys: sqrt of its length, mean or sum"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.chunk, self.per_block, self.nms) < 1 or self.theta < 1:
            raise UserError("dhsa: chunk, per_block and nms count tokens, at least 1; theta is a ratio of 1 or more")

    def bounds(self, row: Row) -> Tensor:
        """``[C + 1]`` ascending columns of ``row.keys`` where chunks begin, and the end."""
        size = row.keys.shape[1]
        if not self.boundaries:
            return even(size, self.chunk, row.k.device)
        scores = Boundaries.of(self.boundaries, row.k.device).scores(row.keys)
        most = max(1, size // self.block) * self.per_block if self.segment == "top" else None
        return cut(scores, self.nms, most=most, theta=None if most else self.theta)

    def choose(self, row: Row) -> Spans:
        bounds = self.bounds(row)
        scores = chunk_scores(row, bounds, self.block, self.sets(row), self.norm)
        return self.filled(scores, bounds, row)


def even(size: int, chunk: int, device: torch.device | str = "cpu") -> Tensor:
    """Bounds of chunks of one length, the last one as long as what is left."""
    inner = torch.arange(0, size, chunk, device=device)
    return torch.cat([inner, inner.new_tensor([size])])


def summed(x: Tensor, bounds: Tensor, norm: Norm = "sqrt") -> Tensor:
    """Sums of ``x [I, S, d]`` between ``bounds [C + 1]`` over the root of their lengths, ``[I, C, d]``.

    Prefix sums are float64: the difference of two of them is otherwise lost in what stands before a late chunk. They
    run along the last axis, where a device adds many tokens at a time.
    """
    sums = torch.nn.functional.pad(x.mT.to(torch.float64, memory_format=torch.contiguous_format).cumsum(2), (1, 0)).mT
    lengths = bounds.diff().double()[:, None]
    scale = {"sqrt": lengths.sqrt(), "mean": lengths, "sum": torch.ones_like(lengths)}[norm]
    found: Tensor = ((sums[:, bounds[1:]] - sums[:, bounds[:-1]]) / scale).to(widened(x).dtype)
    return found


def chunk_scores(row: Row, bounds: Tensor, block: int, sets: int = 1, norm: Norm = "sqrt") -> Tensor:
    """Product of blocks of queries and chunks of keys, ``[I, n, C]``, in float32 or float64.

    Args:
        row: the sequence.
        bounds: ``[C + 1]`` columns of the chunks.
        block: queries of a block.
        sets: I; heads that share a choice are averaged first.
        norm: of a chunk's sum.
    """
    queries = grouped(row.queries, sets)
    blocks = summed(queries, even(queries.shape[1], block, queries.device))
    chunks = summed(grouped(row.keys, min(sets, len(row.k))), bounds, norm)
    return blocks @ grouped(chunks, sets).mT
