# SPDX-License-Identifier: Apache-2.0
"""Pairs and keys between processes, counted from the slices of a mask and the runs of a layout.

Nothing here has an entry for each token: a slice is a rectangle whose pairs lie between two diagonals, and how many of
them are in another rectangle is a closed form. So millions of tokens and a thousand processes take seconds. Where
slices overlap, what two of them share is a slice again, and is taken off (inclusion and exclusion).

A layout may have about as many runs as tokens (a zigzag within each of many short texts). Where more than ``EXACT``
rectangles would have to be counted, what each process needs and works on is still exact, and is shared out among the
owners of the keys as if these lay evenly among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._masks import AttnMask

if TYPE_CHECKING:
    from ._layouts import Layout

__all__ = ["EXACT", "Runs", "needed", "pairs", "row_pairs"]

Ints = NDArray[np.int64]
EXACT = 1 << 27
_CELLS = 1 << 20  # of rectangles that are counted at once
_REGIONS = 1 << 15  # that overlapping slices may part into


@dataclass(frozen=True)
class Runs:
    """Who has which tokens, as runs that follow each other.

    Attributes:
        edges: ``[n + 1]``, where runs begin; the last one is the number of tokens.
        owners: ``[n]``, the process of each run.
        count: processes.
    """

    edges: Ints
    owners: Ints
    count: int

    @classmethod
    def of(cls, layout: Layout) -> Runs:
        """The runs of a layout."""
        owner = layout.owner.numpy()
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        return cls(np.append(starts, len(owner)), owner[starts], len(layout.rows))

    def grouped(self, groups: Ints, count: int) -> Runs:
        """The same with groups in the place of processes; ``groups`` has one for each process."""
        owners = groups[self.owners]
        kept = np.flatnonzero(np.diff(owners, prepend=-1))
        return Runs(np.append(self.edges[:-1][kept], self.edges[-1]), owners[kept], count)

    @property
    def lengths(self) -> Ints:
        """Tokens of each process."""
        return np.bincount(self.owners, np.diff(self.edges), self.count).astype(np.int64)

    def within(self, first: int, last: int) -> slice:
        """Runs that have tokens from ``first`` up to before ``last``."""
        begin = int(np.searchsorted(self.edges, first, "right")) - 1
        return slice(begin, int(np.searchsorted(self.edges[:-1], last, "left")))


def _under(q0: Ints, q1: Ints, k0: Ints, k1: Ints, most: Ints) -> Ints:
    """Pairs (r, c) of a rectangle with ``c - r <= most``."""
    n, start = k1 - k0, most + 1 - k0

    def up_to(x: Ints) -> Ints:
        y = x.clip(0, n + 1)
        found: Ints = y * (y - 1) // 2 + n * (x - n - 1).clip(0)
        return found

    return up_to(q1 + start) - up_to(q0 + start)


def _count(q0: Ints, q1: Ints, k0: Ints, k1: Ints, low: Ints, high: Ints) -> Ints:
    """Pairs of a rectangle between two diagonals, ``low <= c - r <= high``; 0 where the rectangle is none."""
    q1, k1, high = np.maximum(q0, q1), np.maximum(k0, k1), np.maximum(high, low - 1)
    return _under(q0, q1, k0, k1, high) - _under(q0, q1, k0, k1, low - 1)


def _bands(mask: AttnMask) -> Ints:
    """``[slices, 6]``: queries from and to, keys from and to, lowest and highest key less query."""
    found = np.zeros((len(mask.slices), 6), np.int64)
    for i, one in enumerate(mask.slices):
        low = one.k[0] - one.q[0] if one.kind in ("inverse", "both") else -mask.size
        high = one.k[1] - one.q[1] if one.kind in ("causal", "both") else mask.size
        found[i] = (*one.q, *one.k, low, high)
    return found


@lru_cache(maxsize=2)
def _regions(mask: AttnMask) -> tuple[Ints, Ints]:
    """Bands and the sign of each, whose signed pairs are those of the mask, each once."""
    parts, signs = np.zeros((0, 6), np.int64), np.zeros(0, np.int64)
    for band in _bands(mask):
        at = (parts[:, :4:2] < band[1:4:2]).all(1) & (parts[:, 1:4:2] > band[:4:2]).all(1)
        near = parts[at]
        lower = np.maximum(near, band)  # of queries and keys from, and the lowest difference
        upper = np.minimum(near, band)
        shared = np.stack([lower[:, 0], upper[:, 1], lower[:, 2], upper[:, 3], lower[:, 4], upper[:, 5]], 1)
        some = _count(*shared.T) > 0
        parts = np.concatenate([parts, band[None], shared[some]])
        signs = np.concatenate([signs, [1], -signs[at][some]])
        if len(parts) > _REGIONS + len(mask.slices):
            raise UserError(f"slices of this mask overlap in more than {_REGIONS} ways: say it in fewer that do not")
    return parts, signs


def pairs(mask: AttnMask, runs: Runs, exact: int = EXACT) -> Ints:
    """Pairs that are seen, by the process that has the query and the one that has the key: ``[count, count]``."""
    bands, signs = _regions(mask)
    spots = [(runs.within(q0, q1), runs.within(k0, k1)) for q0, q1, k0, k1, *_ in bands]
    if sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in spots) > exact:
        return _pairs_evenly(bands, signs, runs)
    found = np.zeros((runs.count, runs.count), np.int64)
    for (q0, q1, k0, k1, low, high), sign, (rows, columns) in zip(bands, signs, spots, strict=True):
        ks = runs.edges[columns.start : columns.stop + 1].clip(k0, k1)
        step = max(1, _CELLS // max(1, columns.stop - columns.start))
        for at in range(rows.start, rows.stop, step):
            some = slice(at, min(at + step, rows.stop))
            qs = runs.edges[some.start : some.stop + 1].clip(q0, q1)[:, None]
            count = _count(qs[:-1], qs[1:], ks[:-1], ks[1:], low, high)
            np.add.at(found, (runs.owners[some, None], runs.owners[None, columns]), sign * count)
    return found


def _pairs_evenly(bands: Ints, signs: Ints, runs: Runs) -> Ints:
    """Pairs of each process in each slice, shared out by how many of the slice's keys each process has."""
    areas, shares = np.zeros((2, len(bands), runs.count))
    for i, (q0, q1, k0, k1, low, high) in enumerate(bands):
        rows, columns = runs.within(q0, q1), runs.within(k0, k1)
        qs = runs.edges[rows.start : rows.stop + 1].clip(q0, q1)
        ks = runs.edges[columns.start : columns.stop + 1].clip(k0, k1)
        areas[i] = np.bincount(runs.owners[rows], _count(qs[:-1], qs[1:], k0, k1, low, high), runs.count)
        shares[i] = np.bincount(runs.owners[columns], np.diff(ks), runs.count) / max(1, k1 - k0)
    return np.rint((areas * signs[:, None]).T @ shares).astype(np.int64)


def row_pairs(mask: AttnMask, runs: Runs) -> Ints:
    """Pairs of each run's queries, ``[runs]``."""
    found = np.zeros(len(runs.owners), np.int64)
    for (q0, q1, k0, k1, low, high), sign in zip(*_regions(mask), strict=True):
        rows = runs.within(q0, q1)
        qs = runs.edges[rows.start : rows.stop + 1].clip(q0, q1)
        found[rows] += sign * _count(qs[:-1], qs[1:], k0, k1, low, high)
    return found


def needed(mask: AttnMask, of: Runs, keys: Runs, exact: int = EXACT) -> Ints:
    """Keys of each owner in ``keys`` that any query of each owner in ``of`` sees: ``[of.count, keys.count]``."""
    evenly = of.count * len(keys.owners) > exact and of.count == keys.count
    parts: list[Ints] = []
    for q0, q1, k0, k1, low, high in _bands(mask):
        rows = of.within(q0, q1)
        qs = of.edges[rows.start : rows.stop + 1].clip(q0, q1)
        first, last = np.maximum(k0, qs[:-1] + low), np.minimum(k1, qs[1:] + high)
        some = (first < last) & (qs[:-1] < qs[1:])
        parts.append(np.stack([of.owners[rows], first, last], 1)[some])
    every = np.concatenate(parts) if parts else np.zeros((0, 3), np.int64)
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    found = np.zeros((of.count, keys.count), np.int64)
    bounds = np.searchsorted(every[:, 0], np.arange(of.count + 1))
    lengths = keys.lengths
    own = np.argsort(keys.owners, kind="stable") if evenly else keys.owners[:0]
    bounds_own = np.searchsorted(keys.owners[own], np.arange(of.count + 1))
    for owner in range(of.count):
        mine = every[bounds[owner] : bounds[owner + 1]]
        if len(mine) and evenly:
            found[owner] = _needed_evenly(mine, owner, keys, lengths, own[bounds_own[owner] : bounds_own[owner + 1]])
        elif len(mine):
            covered = np.diff(_covered(mine[:, 1], mine[:, 2], keys.edges))
            found[owner] = np.bincount(keys.owners, covered, keys.count)
    return found


def _needed_evenly(mine: Ints, owner: int, keys: Runs, lengths: Ints, own: Ints) -> Ints:
    """The keys of others, in proportion to how many each has; one's own counted."""
    _, first, last = mine.T
    total = _covered(first, last, keys.edges[-1:])[0]
    kept = (_covered(first, last, keys.edges[own + 1]) - _covered(first, last, keys.edges[own])).sum()
    share = lengths.astype(float)
    share[owner] = 0
    found: Ints = np.rint(share * ((total - kept) / (share.sum() or 1))).astype(np.int64)
    found[owner] = kept
    return found


def _covered(first: Ints, last: Ints, edges: Ints) -> Ints:
    """Tokens before each edge that lie in any interval; these are sorted by their beginning."""
    reach = np.maximum.accumulate(last)
    begins = np.append(True, first[1:] > reach[:-1])
    starts = first[begins]
    ends = reach[np.append(np.flatnonzero(begins)[1:] - 1, len(first) - 1)]
    before = np.concatenate([[0], np.cumsum(ends - starts)])
    at = np.searchsorted(starts, edges, "right")
    inside = np.minimum(edges, ends[np.maximum(at - 1, 0)]) - starts[np.maximum(at - 1, 0)]
    found: Ints = np.where(at > 0, before[np.maximum(at - 1, 0)] + inside, 0)
    return found
