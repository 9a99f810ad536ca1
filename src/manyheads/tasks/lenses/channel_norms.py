# SPDX-License-Identifier: Apache-2.0
"""How far the largest channel of a head's queries, keys and values stands out, and whether heads share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...experiment import Metric, Row, RunContext, WorkUnit
from ..text._text_task import model_of
from ._windows import WindowTask, nll

__all__ = ["ChannelNorms"]


@dataclass(frozen=True, kw_only=True)
class ChannelNorms(WindowTask):
    """A value for each layer, the mean of its heads; the baseline's alone."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("channel_peak", "norm of the largest channel over the mean"),
        Metric("massive_channels", "channels above five times the mean norm, a head"),
        Metric("shared_pair", "heads whose largest rotary pair is that of most heads", kind="share"),
    )

    text: str = "code"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "norms", 1.0, "norms of channels")]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        model = model_of(run)
        with manyheads.watch(model, "massive_values") as seen:
            nll(model, self.windows(run))
        tables = seen.compute().tables
        for of in ("q", "k", "v", "q before", "k before"):
            for name, table in (
                ("channel_peak", "peak"),
                ("massive_channels", "massive"),
                ("shared_pair", "agreement"),
            ):
                if f"{table} {of}" not in tables:
                    continue
                for layer, values in enumerate(tables[f"{table} {of}"].mean):
                    yield self.row(name, run.baseline, np.nanmean(values), f"layer {layer}", at={"of": of})
        run.advance(unit.cost)
