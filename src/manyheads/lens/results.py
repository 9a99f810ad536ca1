# SPDX-License-Identifier: Apache-2.0
"""What lenses keep while a model runs, and what they make of it: means, values by token, tables of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..heads import HeadTable

if TYPE_CHECKING:
    from ..call import Site

__all__ = ["LensResult", "Memory", "PerToken", "RunningMean", "stack_ragged", "table", "table_of"]

Memory = dict[str, Any]


def _constant(x: Tensor) -> Tensor:
    """``x`` without a gradient: a detach of what has none would cost the host as much as a kernel."""
    return x.detach() if x.requires_grad else x


class RunningMean:
    """Mean over the tokens of each prompt, ``[N, ...]``, as sums and counts; decoded tokens add to their prompt."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, total: Tensor, count: Tensor, fresh: bool) -> None:
        """Add ``total [B, ...]`` of ``count`` (broadcastable, always in the same way) things."""
        total, count = _constant(total), count.to(total.dtype)
        if fresh or not self.parts:
            self.parts.append((total, count))
        else:
            before, counted = self.parts[-1]
            self.parts[-1] = (before + total, counted + count)

    def mean(self) -> Any:
        """``[N, ...]`` float64; NaN where nothing was counted."""
        if not self.parts:
            return np.zeros((0,))
        parts = [(total.double().cpu(), count.double().cpu().expand_as(total)) for total, count in self.parts]
        total, count = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return (total / count.masked_fill(count == 0, torch.nan)).numpy()


class PerToken:
    """A value for each token of each prompt; NaN for padding. Decoded tokens are put behind their prompts."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, values: Tensor, fresh: bool) -> None:
        """Add ``values [B, T, ...]``."""
        if fresh or not self.parts:
            self.parts.append(_constant(values))
        else:
            self.parts[-1] = torch.cat([self.parts[-1], _constant(values)], 1)

    def rows(self) -> list[Any]:
        """One array ``[T, ...]`` for each prompt."""
        return [row.double().cpu().numpy() for part in self.parts for row in part]


@dataclass
class LensResult:
    """What a lens computed.

    Attributes:
        tables: scores of heads (or of layers: a single column), by name.
        series: for each name, for each prompt, a value for each token, NaN for padding.
        channels: for each name ``[L, H, d]``.
        steps: for each name ``[L, H, steps]`` of what was generated behind the first prompt.
        maps: pooled attention maps ``[R, C]`` of (row of the tables, head).
        curves: for each name, lines by their names over the first of them, as lists of numbers.
        records: for each name, things that were found one by one, as plain values by name: spikes, events, spans.
        notes: sentences for a reader, computed from the figures.
    """

    tables: dict[str, HeadTable] = field(default_factory=dict)
    series: dict[str, list[Any]] = field(default_factory=dict)
    channels: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    maps: dict[tuple[int, int], Any] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def table(name: str, sites: Sequence[tuple[Site, Memory]], key: str, /, **about: Any) -> HeadTable:
    """One table of the means that every site keeps under ``key``, a :class:`RunningMean` of ``[N]`` or ``[N, H]``."""
    return table_of(name, [site for site, _ in sites], [memory[key].mean() for _, memory in sites], **about)


def table_of(name: str, sites: Sequence[Site], rows: Sequence[Any], /, **about: Any) -> HeadTable:
    """One table of the scores ``[N]`` or ``[N, H]`` of each site; NaN where a site has fewer prompts or heads."""
    rows = [row[:, None] if row.ndim == 1 else row for row in rows]
    layers = tuple(site.index if site.layer is None else site.layer for site in sites)
    return HeadTable(name, tuple(site.name for site in sites), stack_ragged(rows).swapaxes(0, 1), about, layers)


def stack_ragged(rows: Sequence[Any]) -> Any:
    """``[L, M, N]`` float64 of arrays ``[m, n]``, NaN where one has fewer rows or columns than the largest."""
    made = np.full((len(rows), *(max(row.shape[axis] for row in rows) for axis in (0, 1))), np.nan)
    for i, row in enumerate(rows):
        made[i, : row.shape[0], : row.shape[1]] = row
    return made
