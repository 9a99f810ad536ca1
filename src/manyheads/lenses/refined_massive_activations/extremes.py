# SPDX-License-Identifier: Apache-2.0
"""Massive entries of the residual stream: which they are, their records, and means by channel, all in one pass.

A hidden state is never kept. What is kept of a prompt while its tokens come, in one forward or one by one, is its few
largest entries and how often each size occurs, a size being a magnitude in 16 bits. The median is thus exact in
bfloat16 and float16; in wider floats it is exact for a prompt that came in one forward, and otherwise that of the
magnitudes rounded to bfloat16, at most 0.4 % off. Of an even number of entries the lower middle one is the median, as
``torch.median`` has it.

Legend: B prompts, T tokens, D channels, K entries kept.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...lens import LensResult

__all__ = ["Extremes", "Means", "joined", "massive", "means", "medians", "most_common", "name_tokens", "spikes"]

Means = dict[str, dict[str, dict[str, float]]]  # site -> start or other -> channel -> value

_CHUNK = 2**24  # entries looked at at once
_SIZES = 2**15  # magnitudes in 16 bits
_HALF = (torch.bfloat16, torch.float16)


def massive(hidden: Tensor, valid: Tensor, median: Tensor, threshold: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """Which entries are massive: ``hidden [B, T, D]``, ``valid [B, T]``, ``median [B]`` -> bool ``[B, T, D]``."""
    size = hidden.abs()
    return (size > threshold) & (size >= ratio * median[:, None, None]) & valid[..., None]


def medians(hidden: Tensor, valid: Tensor) -> Tensor:
    """Median magnitude of the entries of each row's tokens: ``hidden [B, T, D]``, ``valid [B, T]`` -> float32 ``[B]``.

    NaN for a row without tokens.
    """
    made = [row[ok].abs().flatten() for row, ok in zip(hidden, valid, strict=True)]
    return torch.stack([x.median().float() if len(x) else torch.full((), torch.nan).to(x.device) for x in made])


class Extremes:
    """What is kept of the prompts of one batch, as their tokens come: ``count`` entries of each, and its median."""

    values: Tensor  # float32 [B, K], signed, greatest magnitude first; 0 where a prompt has fewer entries
    columns: Tensor  # [B, K], where they stand in the row, padding counted
    positions: Tensor  # [B, K], where among the tokens
    channels: Tensor  # [B, K]
    _dtype: torch.dtype  # of the magnitudes that are counted

    def __init__(self, count: int) -> None:
        self.count = count
        self._sizes: Tensor | None = None  # [B, 2^15] how often each magnitude occurs
        self._median: Tensor | None = None  # [B], where it is known without them

    def add(self, hidden: Tensor, valid: Tensor, columns: Tensor, positions: Tensor) -> None:
        """Take in more tokens.

        Args:
            hidden: ``[B, T, D]``.
            valid: ``[B, T]``, what is a token and no padding.
            columns: ``[T]`` places in the row.
            positions: ``[B, T]`` places among the tokens of the row.
        """
        shape, device, half = (len(hidden), self.count), hidden.device, hidden.dtype in _HALF
        self._median = medians(hidden, valid) if self._sizes is None and not half else None
        if self._sizes is None:
            self.values = torch.zeros(shape, device=device)
            self._places = torch.zeros(3, *shape, dtype=torch.long, device=device)
            self.columns, self.positions, self.channels = self._places
            self._sizes = torch.zeros(len(hidden), _SIZES, dtype=torch.long, device=device)
            self._dtype = hidden.dtype if half else torch.bfloat16
        for row, real in enumerate(valid):
            for tokens in real.nonzero()[:, 0].split(max(1, _CHUNK // hidden.shape[2])):
                part = hidden[row, tokens]
                size = part.abs().flatten()
                bits = size.to(self._dtype).view(torch.int16) & 0x7FFF  # a NaN may come back with a sign
                self._sizes[row] += torch.bincount(bits, minlength=_SIZES)
                best = size.topk(min(self.count, len(size))).indices
                token, channel = best // hidden.shape[2], best % hidden.shape[2]
                at = tokens[token]
                values = torch.cat([self.values[row], part[token, channel].float()])
                places = torch.stack([columns[at], positions[row, at], channel])
                # Those kept come first, and the sort is stable: of equals the earlier one stays, whatever the pieces.
                order = values.abs().sort(descending=True, stable=True).indices[: self.count]
                self.values[row] = values[order]
                self._places[:, row] = torch.cat([self._places[:, row], places], 1)[:, order]

    def median(self) -> Tensor:
        """Median magnitude of each prompt so far, float32 ``[B]``; NaN where it has no tokens."""
        if self._median is not None:
            return self._median
        assert self._sizes is not None
        total = self._sizes.cumsum(1)
        found = (total < (total[:, -1:] + 1) // 2).sum(1).clamp(max=_SIZES - 1)
        values = found.to(torch.int16).view(self._dtype).float()
        return values.masked_fill(total[:, -1] == 0, torch.nan)

    def close(self) -> None:
        """No more tokens will come: keep the median only."""
        self._median = self.median()
        self._sizes = None


def joined(prompts: Sequence[Extremes]) -> tuple[Tensor, ...]:
    """Of all prompts: medians ``[N]``; values, columns, positions and channels ``[N, K]``."""
    kept = ((part.median(), part.values, part.columns, part.positions, part.channels) for part in prompts)
    return tuple(torch.cat(parts) for parts in zip(*kept, strict=True))


def spikes(site: str, layer: int, prompts: Sequence[Extremes], threshold: float, ratio: float) -> list[dict[str, Any]]:
    """The massive ones among the entries kept at a block, prompt by prompt, greatest first."""
    median, values, columns, positions, channels = joined(prompts)
    real = torch.ones_like(values, dtype=torch.bool)
    return [
        {
            "prompt": row, "site": site, "layer": layer, "column": int(columns[row, i]),
            "position": int(positions[row, i]), "channel": int(channels[row, i]), "value": float(values[row, i]),
            "ratio": abs(float(values[row, i])) / max(float(median[row]), 1e-30),
        }
        for row, i, _ in massive(values[..., None], real, median, threshold, ratio).nonzero().tolist()
    ]  # fmt: skip


def means(found: LensResult) -> Means:
    """Mean of the massive entries of each channel, apart for starting and later tokens: what the field ``means`` takes.

    Watch calibration texts (the paper takes 100) with the thresholds of the intervention.
    """
    made: dict[str, Any] = {}
    for spike in found.records["spikes"]:
        channels = made.setdefault(spike["site"], {}).setdefault("other" if spike["position"] else "start", {})
        channels.setdefault(str(spike["channel"]), []).append(spike["value"])
    return {
        site: {kind: {channel: float(np.mean(values)) for channel, values in of.items()} for kind, of in kinds.items()}
        for site, kinds in made.items()
    }


def name_tokens(
    found: LensResult, rows: Sequence[Sequence[int]], decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the token of each spike into its record, and say which tokens have spikes, over prompts and blocks.

    Args:
        found: is added to: ``token`` in every spike.
        rows: token ids of each prompt, padding and decoded tokens included.
        decode: a tokenizer's.

    Returns:
        ``position``, ``token``, ``count`` of spikes and their ``channels``, most spikes first.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for spike in found.records["spikes"]:
        spike["token"] = decode([int(rows[spike["prompt"]][spike["column"]])])
        groups.setdefault((spike["position"], spike["token"]), []).append(spike["channel"])
    made = [
        {"position": at, "token": token, "count": len(channels), "channels": sorted(set(channels))}
        for (at, token), channels in groups.items()
    ]
    return sorted(made, key=lambda row: (-row["count"], row["position"], row["token"]))


def most_common(found: Sequence[dict[str, Any]], key: str, count: int = 5) -> str:
    """``0 (12), 5 (3) and 4 more``: the commonest values with how often they occur."""
    seen = Counter(spike[key] for spike in found).most_common()
    more = f" and {len(seen) - count} more" if len(seen) > count else ""
    return ", ".join(f"{value} ({times})" for value, times in seen[:count]) + more
