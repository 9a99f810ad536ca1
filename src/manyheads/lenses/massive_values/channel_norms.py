# SPDX-License-Identifier: Apache-2.0
"""What the norms of channels say: peaks, massive channels, agreement of heads, and rotary pairs; then in sentences.

Legend: N prompts, H heads, d channels, P rotary pairs. Norms are those of :class:`MassiveValues`, NaN for a prompt
without tokens.
"""

import math
from typing import Any

import numpy as np

from ...lens import LensResult, Memory

__all__ = ["agreement", "massive", "mean_over_prompts", "notes", "pair_norms", "peak", "tokens_per_turn"]


def peak(norms: Any) -> Any:
    """``max_j M_j / mean_j M_j`` of ``norms [..., d]``; NaN where nothing was seen."""
    mean = norms.mean(-1)
    return norms.max(-1) / np.where(mean > 0, mean, np.nan)


def massive(norms: Any, threshold: float) -> Any:
    """How many of ``norms [..., d]`` are above ``threshold`` times their mean; NaN where nothing was seen."""
    mean = norms.mean(-1, keepdims=True)
    return np.where(np.isfinite(mean[..., 0]), (norms > threshold * mean).sum(-1), np.nan)


def agreement(norms: Any) -> Any:
    """Share of heads whose largest of ``norms [N, H, P]`` is the one that is largest in most heads: ``[N]``."""
    best = np.where(np.isfinite(norms), norms, -1).argmax(-1)
    share = np.array([np.bincount(row).max() / len(row) for row in best], dtype=float)
    return np.where(np.isfinite(norms).all((1, 2)), share, np.nan)


def pair_norms(norms: Any, memory: Memory) -> Any:
    """Norms of rotary pairs of ``norms [N, H, d]``, the fastest first, channels without one last: ``[N, H, P]``."""
    width = memory.get("rotary", 0) if norms.shape[-1] == memory["q"].parts[0][0].shape[-1] else 0
    half = width // 2
    turning = np.hypot(norms[..., :half], norms[..., half:width])
    if "pace" in memory:
        turning = turning[..., memory["pace"].argsort(descending=True, stable=True).cpu().numpy()]
    return np.concatenate([turning, norms[..., width:]], -1)


def tokens_per_turn(memory: Memory) -> Any:
    """Tokens in which each rotary pair turns once, the fastest first: ``[1, P]``, NaN for one that never does."""
    pace = memory["pace"].double().cpu().numpy() if "pace" in memory else np.zeros(1)
    return np.sort(2 * math.pi / np.where(pace > 0, pace, np.nan))[None]


def mean_over_prompts(norms: Any) -> Any:
    """Mean over the prompts that have tokens of ``norms [N, H, d]``, NaN where none has."""
    seen = np.isfinite(norms).all((1, 2))
    return norms[seen].mean(0) if seen.any() else np.full(norms.shape[1:], np.nan)


def notes(found: LensResult, threshold: float) -> list[str]:
    """The largest channels and pairs, in sentences."""
    notes = []
    for name in "qkv":
        if not (top := found.tables[f"peak {name}"].top(1)):
            continue
        (row, head), mean = top[0], found.tables[f"peak {name}"].mean
        pairs, count = found.channels[f"{name} pairs"][row], int(np.nansum(found.tables[f"massive {name}"].mean > 0))
        best = int(np.nanargmax(pairs[head]))
        turns = found.channels.get("tokens a turn", np.zeros((0, 1, 0)))
        where = f"layer {found.tables[f'peak {name}'].layers[row]}, head {head}"
        pace = ""
        if name != "v" and row < len(turns) and best < turns.shape[2] and np.isfinite(turns[row, 0, best]):
            turn = f"{turns[row, 0, best]:,.0f}"
            pace = f"; its largest pair is {best} of {turns.shape[2]} from the fastest and turns once in {turn} tokens"
        share = found.tables[f"agreement {name}"].mean[row, 0]
        notes.append(
            f"The largest channel of {name} is {mean[row, head]:.1f} times the mean of its head ({where}{pace}); "
            f"{share:.0%} of the layer's heads share their largest pair, and {count} heads of the model have a channel "
            f"above {threshold:g} times the mean."
        )
    return notes
