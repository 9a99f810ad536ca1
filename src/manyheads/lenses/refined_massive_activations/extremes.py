# SPDX-License-Identifier: Apache-2.0
"""The residual stream in one pass: the largest entries of each prompt, the median of their size, norms of tokens.

A hidden state is never kept. What is kept of a prompt while its tokens come, in one forward or one by one, is its few
largest entries and how often each size occurs, a size being a magnitude in 16 bits. The median is thus exact in
bfloat16 and float16; in wider floats it is exact for a prompt that came in one forward, and otherwise that of the
magnitudes rounded to bfloat16, at most 0.4 % off. Of an even number of entries the lower middle one is the median, as
``torch.median`` has it.

Legend: B prompts, T tokens, D channels, K entries kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Extremes", "medians"]

_CHUNK = 2**24  # entries looked at at once
_SIZES = 2**15  # magnitudes in 16 bits
_HALF = (torch.bfloat16, torch.float16)


def medians(hidden: Tensor, valid: Tensor) -> Tensor:
    """Median magnitude of the entries of each row's tokens: ``hidden [B, T, D]``, ``valid [B, T]`` -> float32 ``[B]``.

    NaN for a row without tokens.
    """
    made = [row[ok].abs().flatten() for row, ok in zip(hidden, valid, strict=True)]
    return torch.stack([x.median().float() if len(x) else torch.full((), torch.nan).to(x.device) for x in made])


@dataclass
class Extremes:
    """What is kept of the prompts of one batch, as their tokens come.

    Attributes:
        count: K, entries kept of each prompt.
        values: signed, greatest magnitude first, float32 ``[B, K]``; 0 where a prompt has fewer entries.
        columns: their places in the row, padding counted; positions: among the tokens; channels: ``[B, K]`` each.
    """

    count: int
    values: Tensor = field(init=False)
    columns: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    channels: Tensor = field(init=False)
    _sizes: Tensor | None = field(default=None, init=False)  # [B, 2^15] how often each magnitude occurs
    _median: Tensor | None = field(default=None, init=False)  # [B], of what came in one forward
    _dtype: torch.dtype = field(default=torch.bfloat16, init=False)

    def add(self, hidden: Tensor, valid: Tensor, columns: Tensor, positions: Tensor) -> None:
        """Take in more tokens.

        Args:
            hidden: ``[B, T, D]``.
            valid: ``[B, T]``, what is a token and no padding.
            columns: ``[T]`` places in the row.
            positions: ``[B, T]`` places among the tokens of the row.
        """
        batch, length, width = hidden.shape
        first = self._sizes is None
        if first:
            self.values = torch.zeros(batch, self.count, device=hidden.device)
            self.columns, self.positions, self.channels = (
                torch.zeros(batch, self.count, dtype=torch.long, device=hidden.device) for _ in range(3)
            )
            self._sizes = torch.zeros(batch, _SIZES, dtype=torch.long, device=hidden.device)
            self._dtype = hidden.dtype if hidden.dtype in _HALF else torch.bfloat16
        self._median = medians(hidden, valid) if first and hidden.dtype not in _HALF else None
        step = max(1, _CHUNK // width)
        for row in range(batch):
            for t in range(0, length, step):
                here = valid[row, t : t + step]
                self._take(
                    row, hidden[row, t : t + step][here], columns[t : t + step][here],
                    positions[row, t : t + step][here],
                )  # fmt: skip

    def _take(self, row: int, hidden: Tensor, columns: Tensor, positions: Tensor) -> None:
        """Tokens ``[N, D]`` of one prompt."""
        assert self._sizes is not None
        size = hidden.abs()
        bits = size.to(self._dtype).view(torch.int16).flatten() & 0x7FFF  # a NaN may come back with a sign
        self._sizes[row] += torch.bincount(bits, minlength=_SIZES)
        flat = size.flatten()
        best = flat.topk(min(self.count, len(flat))).indices
        token, channel = best // hidden.shape[1], best % hidden.shape[1]
        values = torch.cat([self.values[row], hidden[token, channel].float()])
        # Those kept come first, and the sort is stable: of equals the earlier one stays, in whatever pieces they came.
        order = values.abs().sort(descending=True, stable=True).indices[: self.count]
        self.values[row] = values[order]
        for kept, new in ((self.columns, columns[token]), (self.positions, positions[token]), (self.channels, channel)):
            kept[row] = torch.cat([kept[row], new])[order]

    def median(self) -> Tensor:
        """Median magnitude of each prompt so far, float32 ``[B]``; NaN where it has no tokens."""
        if self._median is not None:
            return self._median
        assert self._sizes is not None
        total = self._sizes.cumsum(1)
        middle = (total[:, -1:] + 1) // 2
        found = (total < middle).sum(1).clamp(max=_SIZES - 1)
        values = found.to(torch.int16).view(self._dtype).float()
        return values.masked_fill(total[:, -1] == 0, torch.nan)

    def close(self) -> None:
        """No more tokens will come: keep the median only."""
        self._median = self.median()
        self._sizes = self._sizes[:, :0] if self._sizes is not None else None
