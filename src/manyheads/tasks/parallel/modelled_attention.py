# SPDX-License-Identifier: Apache-2.0
"""What methods would do among many processes: work and bytes counted, times modelled; and areas as others count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...parallel import AttnMask, AttnSlice
from ...parallel._masks import global_window, window
from ._modelled import Setting, modelled

__all__ = ["ModelledAttention", "published_global_window"]

_PUBLISHED = ((4096, 1310), (16384, 5239), (49152, 10477))  # tokens and window, as the benchmark's seed draws them


@dataclass(frozen=True, kw_only=True)
class ModelledAttention(Task):
    """A row for each draw of a mask, number of processes and method; nothing is started.

    Attributes:
        ranks: numbers of processes.
        tokens: of each process.
        masks: names of patterns.
        draws: of each.
        heads, kv_heads, width: as the benchmark's.
        cluster: for which times are modelled.
    """

    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("can", "can", kind="share", higher=True, what="whether the method can share so many heads"),
        Metric("modelled_rate", "modelled", "TFLOP/s", higher=True, what="of a device, by the slowest, forward"),
        Metric("modelled_back", "modelled", "TFLOP/s", higher=True, what="the same, forward and backward"),
        Metric("imbalance", "balance", what="work of the busiest process over the mean"),
        Metric("moved", "keys needed", kind="share", what="from others, of what a ring moves"),
        Metric(
            "told_area", "area told", kind="mean", what="of a global window, by the benchmark's slices over its mask"
        ),
    )

    ranks: tuple[int, ...] = (64, 128)
    tokens: int = 8192
    masks: tuple[str, ...] = ("full", "document_causal")
    draws: int = 6
    heads: int = 64
    kv_heads: int = 8
    width: int = 128
    cluster: str = "h100"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(
                self.key, f"{mask}.{ranks}.{draw}", float(ranks), f"{mask}, {ranks}",
                {"mask": mask, "draw": draw, "ranks": ranks},
            )
            for mask in self.masks
            for ranks in self.ranks
            for draw in range(self.draws)
        ] + [WorkUnit(self.key, "areas", 1.0, "areas", {})]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        if not unit.params:
            for size, width in _PUBLISHED:
                told = published_global_window(size, width).area / global_window(size, width).area
                yield self.row("told_area", run.baseline, told, f"{size}.{width}")
            return
        mask, draw, ranks = (unit.params[name] for name in ("mask", "draw", "ranks"))
        ways = {arm.options["method"]: arm for arm in run.arms}
        setting = Setting(
            ranks=ranks, tokens=ranks * self.tokens, heads=self.heads, kv_heads=self.kv_heads, width=self.width,
            cluster=self.cluster, seed=draw,
        )  # fmt: skip
        sample: dict[str, Any] = {"sample": f"{mask}.{draw}", "at": {"mask": mask, "ranks": ranks}}
        for row in modelled(setting, [mask], ways):
            arm = ways[row["method"]]
            yield self.row("can", arm, "why" not in row, **sample)
            if "why" not in row:
                for name, key in (
                    ("modelled_rate", "rate"),
                    ("modelled_back", "rate_back"),
                    ("imbalance", "imbalance"),
                ):
                    yield self.row(name, arm, row[key], **sample)
                if row["heads"] == 1:
                    yield self.row("moved", arm, row["moved"], **sample)


def published_global_window(size: int, width: int) -> AttnMask:
    """The benchmark's slices of a global window: both rectangles cut causally, and as wide as the window, not twice."""
    parts = [AttnSlice((0, size), (0, width), "causal"), AttnSlice((0, width), (width, size), "causal")]
    for one in window(size - width, width, width).slices:
        (q0, q1), (k0, k1) = one.q, one.k
        parts.append(AttnSlice((q0 + width, q1 + width), (k0 + width, k1 + width), one.kind))
    return AttnMask(tuple(parts), size)
