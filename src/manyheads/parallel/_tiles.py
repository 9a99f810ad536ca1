# SPDX-License-Identifier: Apache-2.0
"""Which tiles of 128 queries and 128 keys a mask of slices lets be seen, for tokens in any order.

The least and greatest token of a block of queries and of one of keys say of a slice that it holds all pairs of their
tile, none, or perhaps some. Only tiles of the last kind are looked at pair by pair, by the runs of keys that their
queries see, on the device where the bits are wanted. What this costs: a byte for each tile on the host, and 2 KiB on
the device for each tile seen in part.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention.tile_pattern import BLOCK, PART, WHOLE, TilePattern, pack
from ._masks import AttnMask

__all__ = ["tiles"]

Ints = NDArray[np.int64]
_AT_ONCE = 1024  # tiles that are looked at together


def tiles(mask: AttnMask, rows: Tensor, tokens: Tensor, device: torch.device | str = "cpu") -> TilePattern:
    """The tiles of ``mask`` whose queries are ``rows`` and whose keys are ``tokens``.

    Args:
        mask: of all tokens.
        rows, tokens: int64 ``[T]`` and ``[S]``, on the host, in any order.
        device: where bits and lists shall be.
    """
    q, k = _blocks(rows), _blocks(tokens)
    state = np.zeros((len(q), len(k)), np.uint8)
    (q_low, q_high), (k_low, k_high) = _ends(q), _ends(k)
    for one in mask.slices:
        i = np.flatnonzero((q_high >= one.q[0]) & (q_low < one.q[1]))
        j = np.flatnonzero((k_high >= one.k[0]) & (k_low < one.k[1]))
        if not len(i) or not len(j):
            continue
        # Complete blocks within the slice: of an incomplete one a place is -1, which is no token.
        within_q = (q[i].min(1) >= one.q[0]) & (q_high[i] < one.q[1])
        within_k = (k[j].min(1) >= one.k[0]) & (k_high[j] < one.k[1])
        may, whole = np.ones((len(i), len(j)), bool), within_q[:, None] & within_k
        if one.kind in ("causal", "both"):
            may &= k_low[j] - q_high[i, None] <= one.k[1] - one.q[1]
            whole &= k_high[j] - q_low[i, None] <= one.k[1] - one.q[1]
        if one.kind in ("inverse", "both"):
            may &= k_high[j] - q_low[i, None] >= one.k[0] - one.q[0]
            whole &= k_low[j] - q_high[i, None] >= one.k[0] - one.q[0]
        part = state[np.ix_(i, j)]
        part[(part == 0) & may] = PART
        part[whole] = WHOLE
        state[np.ix_(i, j)] = part
    words = _look(mask, q, k, state, device)
    return TilePattern(state, words, len(rows), len(tokens))


def _blocks(tokens: Tensor) -> Ints:
    """``[n, 128]``; -1 where there is no token."""
    held = tokens.cpu().numpy()
    return np.pad(held, (0, -len(held) % BLOCK), constant_values=-1).reshape(-1, BLOCK)


def _ends(blocks: Ints) -> tuple[Ints, Ints]:
    """The least and the greatest token of each block."""
    return np.where(blocks < 0, np.iinfo(np.int64).max, blocks).min(1, initial=2**62), blocks.max(1, initial=-1)


def _look(mask: AttnMask, q: Ints, k: Ints, state: NDArray[np.uint8], device: torch.device | str) -> Tensor:
    """Bits of the tiles seen in part; what turns out to be seen as a whole, or not at all, is put down in ``state``."""
    of, first, last = mask._spans
    runs = np.bincount(of, minlength=mask.size)
    runs, begin = (np.append(x, 0) for x in (runs, runs.cumsum() - runs))  # place -1, which is no token, sees none
    (low, high), complete = _ends(k), k.min(1) >= 0
    row, column = np.nonzero(state == PART)
    for turn in range(int(runs[q].min(1).max(initial=0))):  # the run of the same number of all queries of a block
        run = np.where(turn < runs[q], begin[q] + turn, 0)
        end = np.where(turn < runs[q], last[run], 0).min(1)
        whole = (low[column] >= first[run].max(1)[row]) & (high[column] < end[row]) & complete[column]
        state[row[whole], column[whole]] = WHOLE
        row, column = row[~whole], column[~whole]
    told = [torch.from_numpy(x.astype(np.int32)).to(device) for x in (first, last, runs, begin)]
    most, words = runs[q].max(1, initial=0), torch.empty(len(row), BLOCK, BLOCK // 32, dtype=torch.int32, device=device)
    blocks = [torch.from_numpy(x.astype(np.int32)).to(device) for x in (q, k)]
    for start in range(0, len(row), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        queries, keys = (
            x[torch.from_numpy(at[some]).to(device)] for x, at in zip(blocks, (row, column), strict=True)
        )  # fmt: skip
        words[some] = pack(_seen(queries, keys, told, int(most[row[some]].max(initial=0)), mask.size))
    every, none = ((words == x).flatten(1).all(1) for x in (-1, 0))
    for found, kind in ((every, WHOLE), (none, 0)):
        state[row[found.cpu().numpy()], column[found.cpu().numpy()]] = kind
    return words[~(every | none)]


def _seen(queries: Tensor, keys: Tensor, told: list[Tensor], most: int, size: int) -> Tensor:
    """``bool [n, 128, 128]`` of tokens ``[n, 128]``, by up to ``most`` runs of each query.

    ``told``: first and last key of all runs, how many a token has, and the first of them.
    """
    first, last, count, begin = told
    seen = torch.zeros(len(keys), BLOCK, BLOCK, dtype=torch.bool, device=keys.device)
    low, high = keys.masked_fill(keys < 0, size).amin(1, keepdim=True), keys.amax(1, keepdim=True)
    for turn in range(most):
        run = (begin[queries] + turn).clamp(max=len(first) - 1)
        begins, ends = first[run], torch.where(turn < count[queries], last[run], 0)
        met = ((begins <= high) & (ends > low)).any(1).nonzero()[:, 0]
        seen[met] |= (keys[met, None] >= begins[met, :, None]) & (keys[met, None] < ends[met, :, None])
    return seen
