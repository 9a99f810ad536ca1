# SPDX-License-Identifier: Apache-2.0
"""How long dispatches, blocks and sums of gradients take on GPUs that share experts, and what a block holds there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...parallel import MoeConfig, Processes
from . import _moe_runs as runs

__all__ = ["ExpertTimes"]

_BLOCK = MoeConfig(dim=2048, heads=16, kv_heads=4, experts=8, top_k=2, inner=7168)


@dataclass(frozen=True, kw_only=True)
class ExpertTimes(Task):
    """A process for each GPU, by NCCL. A round counts as long as its slowest process.

    Arms are those of :class:`.experts.Experts`.

    Attributes:
        ranks: GPUs.
        rounds: repetitions.
        tokens, dim: of a process, and numbers of a token, where a dispatch is timed; in bfloat16.
        experts: that tokens choose from.
        chosen: how many.
        config, block_tokens: of the block, and tokens of a process there.
        numbers: of a sum that a process gets, in float32.
    """

    subject: ClassVar[str] = "processes"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("dispatch_time", "both ways of a layer, forward and back, ms", "ms", kind="time"),
        Metric("block_held", "activations that a block holds, MB", "MB"),
        Metric("block_peak", "most memory that a block takes, forward and back, MB", "MB"),
        Metric("block_time", "a block forward and back, ms", "ms", kind="time"),
        Metric("sum_time", "each process gets its part of a sum, ms", "ms", kind="time"),
    )

    ranks: int = 2
    rounds: int = 20
    tokens: int = 8192
    dim: int = 4096
    experts: int = 16
    chosen: tuple[int, ...] = (1, 2, 4, 8)
    config: MoeConfig = _BLOCK
    block_tokens: int = 8192
    numbers: int = 1 << 27

    def unsupported_reason(self, run: RunContext) -> str | None:
        if run.device.type == "cuda" and torch.cuda.device_count() >= self.ranks:
            return None
        return f"times are measured on {self.ranks} GPUs; on a CPU only what is sent is counted"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "all", 1.0, "times of experts that GPUs share")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        with Processes(self.ranks, "nccl", limit=300.0) as pool:
            for arm in run.arms:
                yield from self._of(pool, arm)

    def _of(self, pool: Processes, arm: Arm) -> Iterator[Row]:
        given = {"rounds": self.rounds, "numbers": self.numbers, "dim": self.dim, "tokens": self.tokens}
        if arm.spec:
            way: Any = arm.strategy.dispatch  # type: ignore[attr-defined]
            for top_k in self.chosen:
                every = pool.run(runs.dispatch_times, way, self.experts, top_k, given)
                yield from self.each("dispatch_time", arm, _slowest(every), at={"top_k": top_k})
        if "held" in arm.options:
            given = {**given, "tokens": self.block_tokens}
            found = pool.run(runs.block_times, arm.options["held"], self.config, given)
            yield from self.each("block_held", arm, [held / 1e6 for held, _, _ in found])
            yield from self.each("block_peak", arm, [most / 1e6 for _, most, _ in found])
            yield from self.each("block_time", arm, _slowest([times for _, _, times in found]))
        if "sum" in arm.options and "ring" not in arm.options:
            every = pool.run(runs.sum_times, arm.options["sum"], arm.options["sum"] == "float32", given)
            yield from self.each("sum_time", arm, _slowest(every))


def _slowest(every: list[list[float]]) -> list[float]:
    """Milliseconds of each round."""
    return [1e3 * max(times) for times in zip(*every, strict=True)]
