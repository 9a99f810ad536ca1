# SPDX-License-Identifier: Apache-2.0
"""Which process has which tokens. Any number of tokens, any number of processes; none is padded.

``balance`` is what a layout is judged by: the pairs of the busiest process over the mean, and the rows of keys that the
processes need from others, of those that a ring would move.

``greedy`` gives chunks away by falling area to the process that they cost least, where load counts as a share of the
mean and keys that the process does not have yet count ``weight`` for a process's worth of them. Giving the largest
chunk to the emptiest process is MagiAttention's idea; that keys count too, and the search over sizes of chunks and
weights, is ours: of the layouts that are balanced to 5 % it keeps the one that needs the fewest rows of others. Where
there are many tokens and processes, keys count by chunk rather than one by one, and are left out where even that would
take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ._areas import Runs, needed, row_pairs
from ._masks import AttnMask

__all__ = ["LAYOUTS", "Balance", "Layout", "balance", "layout"]

_BALANCED = 1.05
_CHUNKS = (64, 32, 16, 8)  # of a process
_WEIGHTS = (0.0, 0.03, 0.1, 0.3)
_PIECES = 1 << 13  # chunks of all processes, beyond which only the largest are tried
_TOKENS = 1 << 28  # keys of chunks, up to which they count one by one
_LOOKED_AT = 1 << 31  # of keys (or chunks) by process and chunk, that a weighted layout may look at


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
    runs = Runs.of(given)
    areas = np.bincount(runs.owners, row_pairs(mask, runs), runs.count).astype(int).tolist()
    seen = needed(mask, runs, runs)
    ring = (len(given.rows) - 1) * given.size
    foreign = int(seen.sum() - seen.trace())
    return Balance(max(areas) / (sum(areas) / len(areas) or 1), foreign / (ring or 1), tuple(areas))


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
    chunks = np.arange(2 * ranks)
    place = np.minimum(chunks, 2 * ranks - 1 - chunks)
    owners = []
    for number, (start, end) in enumerate(runs):
        # What does not divide lies in the first chunks: take turns, so that it is not always the same process's.
        sizes = (end - start) // (2 * ranks) + (chunks < (end - start) % (2 * ranks))
        owners.append(np.repeat((place - number) % ranks, sizes))
    owner = np.concatenate(owners)
    order = torch.from_numpy(np.argsort(owner, kind="stable"))
    return Layout(order.split(np.bincount(owner, minlength=ranks).tolist()))


def greedy(mask: AttnMask, ranks: int) -> Layout:
    """Of several sizes of chunks and weights the balanced layout that needs the fewest rows of others."""
    found = [contiguous(mask, ranks)]
    for chunks in _CHUNKS:
        if mask.size >= ranks * chunks and (ranks * chunks <= _PIECES or chunks == _CHUNKS[-1]):
            found += _given_away(mask, ranks, chunks)
    judged = [(balance(mask, one), one) for one in found]
    limit = max(_BALANCED, min(b.imbalance for b, _ in judged))
    return min(((b, one) for b, one in judged if b.imbalance <= limit), key=lambda pair: pair[0].moved)[1]


def _given_away(mask: AttnMask, ranks: int, chunks: int) -> Iterator[Layout]:
    """By falling area, each chunk to the process it costs least; all have equally many chunks, up to one."""
    count = ranks * chunks
    edges = np.cumsum([0, *map(len, torch.arange(mask.size).tensor_split(count))])
    each = Runs(edges, np.arange(count), count)
    areas = row_pairs(mask, each).astype(float)
    by_token = count * mask.size <= _TOKENS
    units = Runs(np.arange(mask.size + 1), np.arange(mask.size), mask.size) if by_token else each
    wanted = count * ranks * units.count <= _LOOKED_AT
    needs = needed(mask, each, units) > 0 if wanted else None
    for weight in _WEIGHTS if wanted else (0.0,):
        held = np.zeros((ranks, units.count), bool)
        load, number = np.zeros(ranks), np.zeros(ranks, int)
        mean, share = areas.sum() / ranks or 1.0, units.count / ranks
        taken: list[list[int]] = [[] for _ in range(ranks)]
        for piece in np.argsort(-areas, kind="stable").tolist():
            cost = (load + areas[piece]) / mean
            if weight and needs is not None:
                cost = cost + weight * (needs[piece] & ~held).sum(1) / share
            rank = int(np.where(number < chunks, cost, np.inf).argmin())
            load[rank], number[rank] = load[rank] + areas[piece], number[rank] + 1
            if weight and needs is not None:
                held[rank] |= needs[piece]
                held[rank, slice(*edges[piece : piece + 2]) if by_token else piece] = True
            taken[rank].append(piece)
        yield Layout(tuple(torch.cat([torch.arange(*edges[i : i + 2]) for i in sorted(mine)]) for mine in taken))


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
