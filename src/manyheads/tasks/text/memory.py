# SPDX-License-Identifier: Apache-2.0
"""Bytes that an arm holds after compression and, on a GPU, those allocated at most while it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext
from ._prefill import Prefix, forward_chunked
from ._text_task import TextTask, model_of, tensor

__all__ = ["Memory"]


@dataclass(frozen=True, kw_only=True)
class Memory(TextTask):
    """Counted from the storages of the cache itself; one context of each length is enough, the longest for the peak."""

    alone: ClassVar[bool] = True  # the peak is the device's, whoever allocates
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("cache", "cache, bytes", "bytes", what="what is held of the text once it is read"),
        Metric("peak", "peak, bytes", "bytes", what="the most memory while it is read"),
    )

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{length}", length, f"memory, {length} tokens", {"length": length})
            for length in self.lengths
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, model = unit.params["length"], model_of(run)
        context, text, _ = self.contexts(run).plain("memory", length, 1, 1)[0]
        ids, following = tensor(run, [context[:-1]]), tensor(run, [context[-1:]])
        prefix = Prefix(model, ids, run.arms)
        for arm in run.arms:
            with prefix.open(arm) as cache:
                held = float(cache.bytes())
            yield self.row("cache", arm, held, "0", at={"length": length}, bytes=held, about={"text": text})
        del prefix
        longest = length == self.lengths[-1]
        for arm in run.arms if run.device.type == "cuda" and longest else ():
            torch.cuda.reset_peak_memory_stats(run.device)
            with Prefix(model, ids, [arm]).open(arm) as cache:
                forward_chunked(model, cache, following, 1)
            peak = torch.cuda.max_memory_allocated(run.device)
            yield self.row("peak", arm, peak, "0", at={"length": length}, about={"text": text})
        run.advance(unit.cost)
