# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of linear attention forward and backward over tokens that processes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...parallel import Processes
from ._state_runs import times

__all__ = ["ScanTime"]


@dataclass(frozen=True, kw_only=True)
class ScanTime(Task):
    """Every process has ``tokens``; gates are of heads and tokens. A round is some passes of every arm, in turns.

    An arm without a spec is, by its name, an all-to-all of heads, or each process by itself on as many tokens, which
    is what no exchange at all would take.

    Attributes:
        only: names of the arms that this is about.
        count: processes.
        backend: nccl, with a GPU for each; gloo only to try it out, as its seconds say nothing.
        tokens: of a process.
        heads, width: of the layer; values are as wide.
        rounds: repetitions.
        inner: passes of a round.
    """

    alone: ClassVar[bool] = True
    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("step_time", "forward and backward, ms", "ms", kind="time"),)

    only: tuple[str, ...] = ()
    count: int = 2
    backend: Literal["nccl", "gloo"] = "nccl"
    tokens: tuple[int, ...] = (16_384, 32_768, 65_536)
    heads: int = 32
    width: int = 128
    rounds: int = 12
    inner: int = 5

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.backend == "nccl" and torch.cuda.device_count() < self.count:
            return f"seconds are of {self.count} GPUs by NCCL; here are {torch.cuda.device_count()}"
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{n}", float(n), f"{n} tokens a process", {"tokens": n}) for n in self.tokens]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        tokens = unit.params["tokens"]
        arms: dict[str, Arm] = {arm.key: arm for arm in run.arms if arm.name in self.only}
        specs = {key: arm.full_spec or arm.name for key, arm in arms.items()}
        with Processes(self.count, self.backend, limit=400) as pool:
            found = pool.run(times, specs, tokens, self.heads, self.width, self.rounds, self.inner)[0]
        for key, spent in found.items():
            for turn, ms in enumerate(spent):
                yield self.row("step_time", arms[key], ms, f"{turn}", at={"tokens": tokens})
