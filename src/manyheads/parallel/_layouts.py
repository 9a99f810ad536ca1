# SPDX-License-Identifier: Apache-2.0
"""Which process has which tokens. Any number of tokens, any number of processes; none is padded.

``balance`` is what a layout is judged by: the pairs of the busiest process over the mean, and the rows of keys that the
processes need from others, of those that a ring would move.

``greedy`` gives chunks away by falling area to the process that they cost least, where load counts as a share of the
mean and keys that the process does not have yet count ``weight`` for a process's worth of them. Giving the largest
chunk to the emptiest process is MagiAttention's idea; that keys count too, and the search over sizes of chunks and
weights, is ours: of the layouts that are balanced to 5 % it keeps the one that needs the fewest rows of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ._masks import AttnMask

__all__ = ["LAYOUTS", "Balance", "Layout", "balance", "layout"]

_BALANCED = 1.05
_CHUNKS = (64, 32, 16, 8)  # of a process
_WEIGHTS = (0.0, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Layout:
    """The rows of each process, in the order in which it holds them.

    Attributes:
        rows: of each process, int64 tokens of the whole.
    """

    rows: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        every = torch.cat(self.rows)
        if not torch.equal(every.sort().values, torch.arange(len(every))):
            raise UserError("a layout has every token once")

    @property
    def size(self) -> int:
        """Tokens of all processes."""
        return sum(map(len, self.rows))

    @cached_property
    def owner(self) -> Tensor:
        """The process of each token, int64 ``[size]``."""
        found = torch.empty(self.size, dtype=torch.int64)
        for rank, rows in enumerate(self.rows):
            found[rows] = rank
        return found


@dataclass(frozen=True)
class Balance:
    """How a layout shares a mask out.

    Attributes:
        imbalance: pairs of the busiest process over the mean, 1 at best.
        moved: rows of keys that processes need from others, over those that a ring moves.
        areas: pairs of each process.
    """

    imbalance: float
    moved: float
    areas: tuple[int, ...]


def balance(mask: AttnMask, given: Layout) -> Balance:
    """How ``given`` shares ``mask`` out; nothing is computed."""
    areas = [int(mask.row_areas[rows.numpy()].sum()) for rows in given.rows]
    needs = [mask.needs(rows) for rows in given.rows]
    foreign = [int(seen.sum() - seen[rows].sum()) for seen, rows in zip(needs, given.rows, strict=True)]
    ring = (len(given.rows) - 1) * given.size
    return Balance(max(areas) / (sum(areas) / len(areas) or 1), sum(foreign) / (ring or 1), tuple(areas))


def contiguous(mask: AttnMask, ranks: int) -> Layout:
    """Each process a run of tokens."""
    return Layout(torch.arange(mask.size).tensor_split(ranks))


def striped(mask: AttnMask, ranks: int) -> Layout:
    """Tokens dealt out one by one."""
    return Layout(tuple(torch.arange(rank, mask.size, ranks) for rank in range(ranks)))


def zigzag(mask: AttnMask, ranks: int) -> Layout:
    """Each process one of the first chunks and the one that mirrors it at the end: even for a causal mask."""
    return _mirrored([(0, mask.size)], ranks)


def by_document(mask: AttnMask, ranks: int) -> Layout:
    """A zigzag within each document."""
    ends = np.cumsum(mask.documents or (mask.size,)).tolist()
    return _mirrored(list(zip([0, *ends[:-1]], ends, strict=True)), ranks)


def _mirrored(runs: Sequence[tuple[int, int]], ranks: int) -> Layout:
    parts: list[list[Tensor]] = [[] for _ in range(ranks)]
    for number, (start, end) in enumerate(runs):
        chunks = torch.arange(start, end).tensor_split(2 * ranks)
        for rank in range(ranks):
            # What does not divide lies in the first chunks: take turns, so that it is not always the same process's.
            at = (rank + number) % ranks
            parts[rank] += [chunks[at], chunks[2 * ranks - 1 - at]]
    return Layout(tuple(torch.cat(part) for part in parts))


def greedy(mask: AttnMask, ranks: int) -> Layout:
    """Of several sizes of chunks and weights the balanced layout that needs the fewest rows of others."""
    found = [contiguous(mask, ranks)]
    for chunks in _CHUNKS:
        if mask.size >= ranks * chunks:
            found += [_given_away(mask, ranks, chunks, weight) for weight in _WEIGHTS]
    judged = [(balance(mask, one), one) for one in found]
    limit = max(_BALANCED, min(b.imbalance for b, _ in judged))
    return min(((b, one) for b, one in judged if b.imbalance <= limit), key=lambda pair: pair[0].moved)[1]


def _given_away(mask: AttnMask, ranks: int, chunks: int, weight: float) -> Layout:
    """By falling area, each chunk to the process it costs least; all have equally many chunks, up to one."""
    pieces = torch.arange(mask.size).tensor_split(ranks * chunks)
    areas = np.array([mask.row_areas[piece.numpy()].sum() for piece in pieces], float)
    needs = np.stack([mask.needs(piece).numpy() for piece in pieces])
    mean, share = areas.sum() / ranks or 1.0, mask.size / ranks
    load, count = np.zeros(ranks), np.zeros(ranks, int)
    held = np.zeros((ranks, mask.size), bool)
    taken: list[list[int]] = [[] for _ in range(ranks)]
    for piece in np.argsort(-areas, kind="stable").tolist():
        cost = (load + areas[piece]) / mean
        if weight:
            cost = cost + weight * (needs[piece] & ~held).sum(1) / share
        rank = int(np.where(count < chunks, cost, np.inf).argmin())
        load[rank], count[rank] = load[rank] + areas[piece], count[rank] + 1
        held[rank] |= needs[piece]
        held[rank, pieces[piece].numpy()] = True
        taken[rank].append(piece)
    return Layout(tuple(torch.cat([pieces[i] for i in sorted(mine)]) for mine in taken))


LAYOUTS: dict[str, Callable[[AttnMask, int], Layout]] = {
    "contiguous": contiguous, "striped": striped, "zigzag": zigzag, "document": by_document, "greedy": greedy,
}  # fmt: skip


def layout(name: str, mask: AttnMask, ranks: int) -> Layout:
    """A layout by name.

    Raises:
        UserError: there is none of that name, or more processes than tokens.
    """
    if name not in LAYOUTS:
        raise UserError(f"there is no layout {name!r}; there are {', '.join(LAYOUTS)}")
    if not 1 <= ranks <= mask.size:
        raise UserError(f"{mask.size} tokens cannot be shared by {ranks} processes; use fewer")
    return LAYOUTS[name](mask, ranks)
