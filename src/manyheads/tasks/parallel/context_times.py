# SPDX-License-Identifier: Apache-2.0
"""Times of attention over tokens that processes share, on GPUs alone: processes of one CPU wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...experiment import Metric, Row, RunContext, WorkUnit
from .context_attention import ContextAttention

__all__ = ["ContextTimes"]


@dataclass(frozen=True, kw_only=True)
class ContextTimes(ContextAttention):
    """As :class:`.ContextAttention`, with rows of what is timed."""

    metrics: ClassVar[tuple[Metric, ...]] = tuple(
        m for m in ContextAttention.metrics if m.name in ("slowest", "mean", "rate")
    )

    backend: str = "nccl"
    dtype: str = "bfloat16"
    checked: int = 0

    def unsupported_reason(self, run: RunContext) -> str | None:
        count = torch.cuda.device_count() if run.device.type == "cuda" else 0
        return (
            None if count >= self.ranks else f"times are of a GPU for each of {self.ranks} processes; here are {count}"
        )

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        names = {metric.name for metric in self.metrics}
        yield from (row for row in super().measure(run, unit) if row.metric in names)

    def metric(self, name: str) -> Metric:
        return next(metric for metric in ContextAttention.metrics if metric.name == name)
