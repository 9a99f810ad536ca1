# SPDX-License-Identifier: Apache-2.0
"""Causal masks of sequences in which some tokens are padding, or in which several texts stand in a row."""

from __future__ import annotations

from collections.abc import Sequence

from ._masks import AttnMask, AttnSlice, window

__all__ = ["causal_runs"]


def causal_runs(size: int, runs: Sequence[tuple[int, int]], before: int | None = None, apart: bool = True) -> AttnMask:
    """Each token sees itself and those before it that stand in a run.

    Args:
        size: tokens.
        runs: first token of each, and the one after its last; in order.
        before: tokens that are seen before a token, at most; None for all.
        apart: a token sees its own run alone (texts in a row). Else it sees all runs (what is between is padding), and
            so do tokens that stand in none.
    """
    slices: list[AttnSlice] = []
    for start, end in runs:
        length = end - start
        inside = window(length, length if before is None else min(before, length))
        for one in inside.slices:
            q, k = ((a + start, b + start) for a, b in (one.q, one.k))
            slices.append(AttnSlice(q, k, one.kind))
        if apart or end == size:
            continue
        cut = size if before is None else min(size, max(end, start + before + 1))  # from here on not all of the run
        slices.append(AttnSlice((end, cut), (start, end)))
        last = cut if before is None else min(size, end + before)
        if before is not None and cut < last:
            slices.append(AttnSlice((cut, last), (cut - before, end), "inverse"))
    several = apart and len(runs) > 1 and sum(end - start for start, end in runs) == size
    return AttnMask(tuple(slices), size, tuple(end - start for start, end in runs) if several else ())
