# SPDX-License-Identifier: Apache-2.0
"""Which keys each query sees, as a list of slices: exact areas, and what some rows need, without a matrix of all pairs.

A slice is a rectangle of queries and keys, whole or cut along a diagonal. Every row of a slice sees one run of keys, so
that a mask of a million tokens is a few numbers for each row. Slices may overlap: a pair is seen once.

The vocabulary and the patterns are those of the Long-Context Attention Benchmark (arXiv 2510.17896); where its lists of
slices and its masks disagree (global rows and columns beside a window), the mask counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError

__all__ = ["PATTERNS", "AttnMask", "AttnSlice", "Kind", "documents_of", "pattern"]

Kind = Literal["full", "causal", "inverse", "both"]
Ints = NDArray[np.int64]
Run = tuple[int, int]


@dataclass(frozen=True)
class AttnSlice:
    """Queries ``q`` and keys ``k``, each from a first token up to before a last one.

    ``full``: each query sees all keys. ``causal``: the last query sees all, each earlier one a key less at the end.
    ``inverse``: the first query sees all, each later one a key less at the beginning. ``both``: a band, cut both ways.
    """

    q: Run
    k: Run
    kind: Kind = "full"

    def spans(self) -> tuple[Ints, Ints, Ints]:
        """Rows, and the first key of each and the one after its last; rows that see none are left out."""
        rows = np.arange(*self.q, dtype=np.int64)
        first = np.full_like(rows, self.k[0])
        last = np.full_like(rows, self.k[1])
        if self.kind in ("inverse", "both"):
            first = first + rows - self.q[0]
        if self.kind in ("causal", "both"):
            last = last - (self.q[1] - 1 - rows)
        first, last = first.clip(*self.k), last.clip(*self.k)
        some = first < last
        return rows[some], first[some], last[some]


@dataclass(frozen=True)
class AttnMask:
    """The pairs of any slice, of ``size`` queries and as many keys.

    Attributes:
        slices: which may overlap.
        size: tokens.
        documents: tokens of each of the texts in a row that do not see each other, where there are several.
    """

    slices: tuple[AttnSlice, ...]
    size: int
    documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for one in self.slices:
            if not (0 <= one.q[0] <= one.q[1] <= self.size and 0 <= one.k[0] <= one.k[1] <= self.size):
                raise UserError(f"{one} reaches outside of {self.size} tokens")

    @cached_property
    def _spans(self) -> tuple[Ints, Ints, Ints]:
        """Rows, first and last keys of the union: runs of one row neither overlap nor touch, sorted by row and key."""
        found = [one.spans() for one in self.slices] or [(np.zeros(0, np.int64),) * 3]
        rows, first, last = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((first, rows))
        rows, first, last = rows[order], first[order], last[order]
        # A run begins where the row is new, or where all earlier runs of the row have ended.
        reach = np.maximum.accumulate(last + rows * (self.size + 1)) if len(rows) else last
        begins = np.ones(len(rows), bool)
        begins[1:] = first[1:] + rows[1:] * (self.size + 1) > reach[:-1]
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], len(rows)) - 1
        return rows[starts], first[starts], (reach[ends] - rows[ends] * (self.size + 1) if len(rows) else last)

    @cached_property
    def row_areas(self) -> Ints:
        """Keys that each query sees."""
        rows, first, last = self._spans
        return np.bincount(rows, weights=(last - first), minlength=self.size).astype(np.int64)

    @property
    def area(self) -> int:
        """Pairs that are seen, each counted once."""
        return int(self.row_areas.sum())

    def needs(self, rows: Tensor) -> Tensor:
        """Keys that any of the rows sees, bool ``[size]``."""
        mine = np.zeros(self.size, bool)
        mine[rows.cpu().numpy()] = True
        of, first, last = self._spans
        chosen = mine[of]
        steps = np.bincount(first[chosen], minlength=self.size + 1) - np.bincount(
            last[chosen], minlength=self.size + 1
        )  # fmt: skip
        return torch.from_numpy(steps.cumsum()[: self.size] > 0)

    def dense(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of the columns each of the rows sees, bool ``[rows, columns]``, on the device of ``rows``."""
        seen = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
        r, c = rows[:, None], columns[None]
        for one in self.slices:
            hit = (r >= one.q[0]) & (r < one.q[1]) & (c >= one.k[0]) & (c < one.k[1])
            if one.kind in ("inverse", "both"):
                hit &= c - one.k[0] >= r - one.q[0]
            if one.kind in ("causal", "both"):
                hit &= one.k[1] - c > one.q[1] - 1 - r
            seen |= hit
        return seen


def full(size: int) -> AttnMask:
    """Every token sees every token."""
    return AttnMask((AttnSlice((0, size), (0, size)),), size)


def causal(size: int) -> AttnMask:
    """Every token sees itself and those before."""
    return AttnMask((AttnSlice((0, size), (0, size), "causal"),), size)


def window(size: int, before: int, after: int = 0) -> AttnMask:
    """Every token sees itself, so many before it and so many after it."""
    a, b = min(before, size), max(size - after, 0)
    parts = (
        ((0, min(a, b)), (0, min(a, b) + after), "causal"),
        ((a, b), (0, b + after), "both"),
        ((max(a, b), size), (max(a, b) - before, size), "inverse"),
        ((b, a), (0, size), "full"),
    )
    return AttnMask(tuple(AttnSlice(q, k, kind) for q, k, kind in parts if q[0] < q[1]), size)  # type: ignore[arg-type]


def _runs(lengths: Sequence[int]) -> list[Run]:
    ends = np.cumsum(lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def documents(lengths: Sequence[int], kind: Kind = "full") -> AttnMask:
    """Texts in a row that do not see each other."""
    return AttnMask(tuple(AttnSlice(run, run, kind) for run in _runs(lengths)), sum(lengths), tuple(lengths))


def prefix(lengths: Sequence[int], prefixes: Sequence[int]) -> AttnMask:
    """Texts in a row; all of a text sees its prefix, the rest is causal."""
    found = []
    for (start, end), p in zip(_runs(lengths), prefixes, strict=True):
        found += [
            AttnSlice((start, start + p), (start, start + p)),
            AttnSlice((start + p, end), (start, end), "causal"),
        ]
    several = tuple(lengths) if len(lengths) > 1 else ()
    return AttnMask(tuple(found), sum(lengths), several)


def shared_question(lengths: Sequence[int]) -> AttnMask:
    """The first text is seen by all later ones, which do not see each other; each is causal."""
    question, *answers = _runs(lengths)
    found = [AttnSlice(question, question, "causal")]
    for run in answers:
        found += [AttnSlice(run, question), AttnSlice(run, run, "causal")]
    return AttnMask(tuple(found), sum(lengths))


def last_sees_all(lengths: Sequence[int]) -> AttnMask:
    """Texts are causal by themselves; the last one sees all before it too."""
    *others, (start, end) = _runs(lengths)
    found = [AttnSlice(run, run, "causal") for run in others]
    return AttnMask((*found, AttnSlice((start, end), (0, end), "causal")), sum(lengths))


def global_window(size: int, width: int) -> AttnMask:
    """A window of ``width`` both ways; besides, the first ``2 * width`` tokens see all and are seen by all."""
    first = min(2 * width, size)
    rest = AttnSlice((first, size), (0, first))
    return AttnMask((AttnSlice((0, first), (0, size)), rest, *window(size, width, width).slices), size)


def block_causal(lengths: Sequence[int], block: int) -> AttnMask:
    """Texts in a row; within a text a token sees its own block and those before."""
    found = [
        AttnSlice((at, min(at + block, end)), (start, min(at + block, end)))
        for start, end in _runs(lengths)
        for at in range(start, end, block)
    ]
    return AttnMask(tuple(found), sum(lengths), tuple(lengths))


def random_blocks(size: int, edges: Sequence[int], density: float, rng: np.random.Generator) -> AttnMask:
    """Blocks between ``edges``, of which each block of queries sees itself and others at random."""
    runs = list(pairwise(edges))
    count = max(1, round(density * len(runs)))
    found = []
    for i, q in enumerate(runs):
        others = rng.permutation([j for j in range(len(runs)) if j != i])[: count - 1]
        found += [AttnSlice(q, runs[j]) for j in sorted([i, *others.tolist()])]
    return AttnMask(tuple(found), size)


# Lengths of documents in tokens, from which a bin is drawn and a length within it: (from, up to, share in percent).
_LENGTHS = (
    (16, 200, 21.4), (201, 500, 28.2), (501, 1024, 24.6), (1025, 2048, 15.7), (2049, 4096, 5.6), (4097, 8192, 2.6),
    (8193, 32768, 1.6), (32769, 131072, 0.3),
)  # fmt: skip


def documents_of(size: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Lengths of texts that fill ``size`` tokens, most short and a few very long; the last one is what is left.

    The shares of 201 to 2,048 tokens are those of documents that language models are trained on, as the benchmark's
    neighbour MagiAttention publishes them; the others fill the rest, by choice. No text takes more than half.
    """
    shares = np.array([share for *_, share in _LENGTHS])
    found: list[int] = []
    while (left := size - sum(found)) > 0:
        low, high, _ = _LENGTHS[rng.choice(len(shares), p=shares / shares.sum())]
        found.append(min(int(rng.integers(low, high + 1)), left, max(size // 2, 1)))
    return tuple(found)


def _edges(size: int, block: int, rng: np.random.Generator) -> list[int]:
    """Blocks of at least half of ``block``, on average about as large as it."""
    edges = [0]
    while size - edges[-1] > 2 * block:
        edges.append(edges[-1] + int(rng.integers(block // 2, 3 * block // 2 + 1)))
    return [*edges, size]


def _prefixes(lengths: Sequence[int], rng: np.random.Generator) -> list[int]:
    return [int(rng.integers(1, n + 1)) for n in lengths]


def _width(size: int) -> int:
    return max(1, min(1024, size // 8))


PATTERNS: dict[str, Callable[[int, np.random.Generator], AttnMask]] = {
    "full": lambda n, _: full(n),
    "causal": lambda n, _: causal(n),
    "window": lambda n, _: window(n, _width(n), _width(n)),
    "window_causal": lambda n, _: window(n, _width(n)),
    "document": lambda n, rng: documents(documents_of(n, rng)),
    "document_causal": lambda n, rng: documents(documents_of(n, rng), "causal"),
    "prefix": lambda n, rng: prefix((n,), _prefixes((n,), rng)),
    "document_prefix": lambda n, rng: prefix(d := documents_of(n, rng), _prefixes(d, rng)),
    "shared_question": lambda n, rng: shared_question(documents_of(n, rng)),
    "last_sees_all": lambda n, rng: last_sees_all(documents_of(n, rng)),
    "global_window": lambda n, rng: global_window(n, max(1, int(rng.integers(1, max(2, n // 3))))),
    "document_blocks": lambda n, rng: block_causal(documents_of(n, rng), _width(n)),
    "blocks": lambda n, rng: random_blocks(n, [*range(0, n, max(1, n // 32)), n], 0.2, rng),
    "uneven_blocks": lambda n, rng: random_blocks(n, _edges(n, max(2, n // 32), rng), 0.2, rng),
}


def pattern(name: str, size: int, seed: int = 0) -> AttnMask:
    """One of the fourteen patterns; texts, prefixes, widths and blocks are drawn.

    Raises:
        UserError: there is no such pattern, or no tokens.
    """
    if name not in PATTERNS:
        raise UserError(f"there is no mask {name!r}; there are {', '.join(PATTERNS)}")
    if size < 1:
        raise UserError(f"a mask has one token or more, not {size}")
    return PATTERNS[name](size, np.random.default_rng([seed, *name.encode()]))
