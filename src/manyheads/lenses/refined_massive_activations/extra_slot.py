# SPDX-License-Identifier: Apache-2.0
"""How much attention goes to the slots of a :class:`KVBias`, which are no tokens and may take the sink's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...call import Site
from ...calls.statistics import Statistic, WeightedSum
from ...lens import AttentionView, Lens, LensResult, Memory, RunningMean, table

__all__ = ["ExtraSlot"]


@dataclass(frozen=True, kw_only=True)
class ExtraSlot(Lens):
    """Mass on keys that are no tokens, mean over the rows after the first: table ``extra slot``."""

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        extra = (view.key_positions < 0).expand_as(view.keys)
        return {"mass": WeightedSum(extra.float()[..., None])}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        rows = (view.valid & ~view.columns("bos")[:, -view.valid.shape[1] :])[:, None]
        total = found["mass"][..., 0].masked_fill(~rows, 0.0).sum(-1)
        view.memory.setdefault("mass", RunningMean()).add(total, rows.sum(-1), view.fresh)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        return LensResult(tables={"extra slot": table("attention on slots that are no tokens", sites, "mass")})
