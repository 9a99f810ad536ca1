# SPDX-License-Identifier: Apache-2.0
"""What each process of a grid works on and sends, by formulas: nothing is computed, sent or timed.

The names of what is sent are those of the ledger, and so are its bytes; a test holds both equal. What the model of
:mod:`._cost` says of time stands on this alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._areas import Runs, needed, pairs, row_pairs
from ._context import EXCHANGES
from ._exchanges import steps_away
from ._layouts import Layout, layout
from ._masks import AttnMask

__all__ = ["Counts", "Ints", "Shape", "count"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Efficient = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Shape:
    """Of queries, keys and values.

    Attributes:
        heads, kv_heads: of queries, and of keys.
        width: channels of a head.
        values: those of values; as many where 0.
        batch: rows.
        itemsize: bytes of a number.
    """

    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    values: int = 0
    batch: int = 1
    itemsize: int = 2

    @property
    def channels(self) -> int:
        """Of a key and its value."""
        return self.width + (self.values or self.width)

    @property
    def wide(self) -> int:
        """Bytes of a number that is added up: float32, or float64."""
        return max(4, self.itemsize)


@dataclass(frozen=True)
class Counts:
    """A grid of processes, contexts by heads, that share a mask.

    Attributes:
        shape: of the tensors.
        exchange, window: as :class:`.ContextParallel` takes them; the window of a ring's inner ring.
        grid: ``[contexts, heads]``, the rank of each.
        tokens: ``[ranks]``, of each process before heads are shared.
        rows: ``[contexts]``, tokens of each context.
        pairs: ``[contexts, contexts]``, that are seen, by the context of the query and that of the key.
        seen: likewise keys that any query sees.
        pieces: of each context the pairs of each run of its queries, and the length of a piece of them.
    """

    shape: Shape
    exchange: str
    window: int
    grid: Ints
    tokens: Ints
    rows: Ints
    pairs: Ints
    seen: Ints
    pieces: tuple[tuple[Ints, Floats], ...]

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.grid.size

    @cached_property
    def context_of(self) -> Ints:
        """The context of each process."""
        return self._place(0)

    @cached_property
    def head_of(self) -> Ints:
        """The part of the heads of each process."""
        return self._place(1)

    def _place(self, axis: int) -> Ints:
        found = np.empty(self.ranks, np.int64)
        found[self.grid] = np.indices(self.grid.shape)[axis]
        return found

    @property
    def heads(self) -> int:
        """Processes that share heads among them."""
        return int(self.grid.shape[1])

    @property
    def kv_heads(self) -> int:
        """Heads of keys of all of them, repeated where there are fewer than processes."""
        return max(self.shape.kv_heads, self.heads)

    @property
    def row_bytes(self) -> int:
        """Of a token's keys and values in one process."""
        return self.shape.batch * self.kv_heads // self.heads * self.shape.channels * self.shape.itemsize

    @property
    def wide_bytes(self) -> int:
        """Of their gradients, which are added up in wider numbers."""
        return self.row_bytes // self.shape.itemsize * self.shape.wide

    @property
    def flops_of_pair(self) -> int:
        """Operations of one pair of tokens in one process, forward."""
        return 2 * self.shape.batch * self.shape.channels * (self.shape.heads // self.heads)

    @property
    def area(self) -> int:
        """Pairs of the mask."""
        return int(self.pairs.sum())

    @property
    def flops(self) -> int:
        """Of all processes, forward, by the pairs that the mask has."""
        return self.area * self.flops_of_pair * self.heads

    @property
    def imbalance(self) -> float:
        """Work of the busiest process over the mean."""
        work = self.pairs.sum(1)
        return float(work.max() / (work.mean() or 1))

    @property
    def moved(self) -> float:
        """Keys that contexts need of others, over those that a ring among them moves."""
        ring = (len(self.rows) - 1) * int(self.rows.sum())
        return int(self.seen.sum() - self.seen.trace()) / (ring or 1)

    def tiles(self, efficiency: Efficient) -> Floats:
        """The efficiency of each context by the lengths of its pieces, weighted by time."""
        found = []
        for area, length in self.pieces:
            some = area > 0
            seconds = (area[some] / efficiency(length[some])).sum()
            found.append(area.sum() / seconds if seconds else 1.0)
        return np.array(found)

    @cached_property
    def _sent(self) -> tuple[Mapping[str, Ints], Mapping[str, Ints]]:
        exchange = {"ring": self._ring, "all_gather": self._all_gather, "group_cast": self._group_cast}[self.exchange]
        return {**self._among_heads(False), **exchange(False)}, {**self._among_heads(True), **exchange(True)}

    def sent(self, back: bool) -> Mapping[str, Ints]:
        """Bytes by exchange, of each process to each other, ``[ranks, ranks]``; one way, forward or back."""
        return self._sent[back]

    def total(self, backward: bool = True, node: int = 0) -> int:
        """Bytes that all processes send; with ``node`` only those between machines of so many."""
        ways = [*self.sent(False).values(), *(self.sent(True).values() if backward else ())]
        machine = np.arange(self.ranks) // (node or self.ranks)
        apart = machine[:, None] != machine if node else np.ones((self.ranks, self.ranks), bool)
        return int(sum((one * apart).sum() for one in ways))

    def least(self, backward: bool = True) -> int:
        """Bytes that this grid and layout cannot do without: what shares heads, and only keys that are seen."""
        rows = int(self.seen.sum() - self.seen.trace()) * self.heads
        ways = [False, True] if backward else [False]
        among = sum(int(one.sum()) for back in ways for one in self._among_heads(back).values())
        return among + rows * (self.row_bytes + (backward and self.row_bytes + self.wide_bytes))

    def _among_heads(self, back: bool) -> dict[str, Ints]:
        """All-to-all of queries, keys and values, and of the output and its log-sum-exp."""
        if self.heads < 2:
            return {}
        shape, n = self.shape, self.heads
        values = shape.values or shape.width
        kv = self.kv_heads * shape.channels
        item, mine = shape.batch * shape.itemsize, shape.heads // n
        ins, outs = (mine * shape.width + kv // n) * item, mine * values * item
        if back:  # gradients of the output go in, those of queries, keys and values come out
            by_sender, by_receiver = outs, ins
        else:
            by_sender, by_receiver = ins, outs + shape.batch * mine * shape.wide
        same = (self.context_of[:, None] == self.context_of) & ~np.eye(self.ranks, dtype=bool)
        size = self.tokens[:, None] * by_sender + self.tokens[None] * by_receiver
        return {f"all-to-all{', back' if back else ''}": size * same}

    def _spread(self, rows: Ints, size: int) -> Ints:
        """Bytes between processes of rows ``[contexts, contexts]`` that contexts send each other; none to oneself."""
        c, h = self.context_of, self.head_of
        found: Ints = rows[c[:, None], c] * size * (h[:, None] == h) * (c[:, None] != c)
        return found

    def _ring(self, back: bool) -> dict[str, Ints]:
        n, more = len(self.rows), ", back" if back else ""
        me, ring = np.arange(n), (self.window, n // self.window)
        inner, outer, gradients, home = (np.zeros((n, n), np.int64) for _ in range(4))
        ends = me, steps_away(me, *ring, 0, 1)
        across = me, steps_away(me, *ring, 1, 0)
        for window in range(ring[1]):
            for place in range(ring[0]):
                rows = self.rows[steps_away(me, *ring, -window, -place)]
                gradients[ends] += rows
                inner[ends] += rows * (place < ring[0] - 1)
            first = self.rows[steps_away(me, *ring, -window, 0)]
            home[across] += first
            outer[across] += first * (window < ring[1] - 1)
        found = {f"ring{more}": self._spread(inner, self.row_bytes)}
        found[f"ring between windows{more}"] = self._spread(outer, self.row_bytes)
        if back:
            found["ring, gradients"] = self._spread(gradients, self.wide_bytes)
            found["ring between windows, gradients"] = self._spread(home, self.wide_bytes)
        return found

    def _all_gather(self, back: bool) -> dict[str, Ints]:
        longest = np.full_like(self.pairs, self.rows.max())
        if not back:
            return {"all-gather": self._spread(longest, self.row_bytes)}
        owners = np.broadcast_to(self.rows, longest.shape)
        return {
            "all-gather, back": self._spread(longest, self.row_bytes),
            "all-gather, gradients": self._spread(owners, self.wide_bytes),
        }

    def _group_cast(self, back: bool) -> dict[str, Ints]:
        if not back:
            return {"group-cast": self._spread(self.seen.T, self.row_bytes)}
        return {
            "group-cast, back": self._spread(self.seen.T, self.row_bytes),
            "group-cast, gradients": self._spread(self.seen, self.wide_bytes),
        }


def count(
    mask: AttnMask, ranks: int, given: str | Layout, shape: Shape, exchange: str = "group_cast", heads: int = 1,
    window: int | None = None, place: str = "head",
) -> Counts:  # fmt: skip
    """Count what :class:`.ContextParallel` of the same arguments would do among so many processes.

    Raises:
        UserError: it would refuse them.
    """
    if exchange not in EXCHANGES:
        raise UserError(f"there is no exchange {exchange!r}; there are {', '.join(EXCHANGES)}")
    if heads < 1 or ranks % heads:
        raise UserError(f"{ranks} processes do not divide into {heads} that share heads")
    if shape.heads % heads or max(shape.kv_heads, heads // shape.kv_heads * shape.kv_heads) % heads:
        raise UserError(f"{shape.heads} heads with {shape.kv_heads} of keys cannot be shared by {heads} processes")
    contexts = ranks // heads
    if contexts % (window or contexts):
        raise UserError(f"{contexts} processes of a ring do not divide into windows of {window}")
    given = layout(given, mask, ranks) if isinstance(given, str) else given
    return Counts(shape, exchange, window or contexts, *_shared(mask, given, heads, place))


@lru_cache(maxsize=4)
def _shared(mask: AttnMask, given: Layout, heads: int, place: str) -> tuple[Any, ...]:
    """What depends on mask, layout and grid alone: the last six fields of :class:`Counts`."""
    ranks = len(given.rows)
    contexts, runs = ranks // heads, Runs.of(given)
    grid = np.arange(ranks).reshape(contexts, heads) if place == "head" else np.arange(ranks).reshape(heads, -1).T
    groups = np.empty(ranks, np.int64)
    groups[grid] = np.arange(contexts)[:, None]
    joined = runs.grouped(groups, contexts)
    area, length = row_pairs(mask, joined), np.diff(joined.edges)
    short = np.minimum(length, area / length)
    order = np.argsort(joined.owners, kind="stable")
    ends = np.searchsorted(joined.owners[order], np.arange(1, contexts))
    pieces = tuple(zip(np.split(area[order], ends), np.split(short[order], ends), strict=True))
    return grid, runs.lengths, joined.lengths, pairs(mask, joined), needed(mask, joined, joined), pieces
