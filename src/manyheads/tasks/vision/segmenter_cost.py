# SPDX-License-Identifier: Apache-2.0
"""Seconds that a SegFormer of first weights, which cost what any cost, takes for an image; all arms in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ._segmenters import SegmenterTask

__all__ = ["SegmenterCost"]


@dataclass(frozen=True, kw_only=True)
class SegmenterCost(SegmenterTask):
    """One round is one image of noise under every arm in turn, in another order each round; first calls are not timed.

    Attributes:
        height, across: of the image in pixels.
        rounds: repetitions.
        dtype: of weights and image, as ``bfloat16``.
        device: what it is measured on, ``cuda`` where a processor that others use would say nothing; empty for any.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("seconds", "seconds an image", "s", kind="time"),)

    height: int = 1024
    across: int = 2048
    rounds: int = 9
    dtype: str = "float32"
    device: str = ""

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.device in ("", run.device.type):
            return None
        return f"seconds are compared on {self.device} alone: elsewhere other work shares the machine"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{i}", len(run.arms), f"seconds, round {i + 1}", {"round": i})
            for i in range(self.rounds)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        turn = unit.params["round"]
        dtype: torch.dtype = getattr(torch, self.dtype)
        model = run.kept(("segmenter", self.key), lambda: self.fresh(run, 0).to(dtype))
        noise = torch.randn(1, 3, self.height, self.across, generator=run.torch_rng(part="noise"))
        images, first = noise.to(run.device, dtype), turn % len(run.arms)
        for arm in run.arms[first:] + run.arms[:first]:
            run.kept(("warm", self.key, arm.key), partial(self._seconds, run, model, arm, images))
            yield self.row("seconds", arm, self._seconds(run, model, arm, images), f"{turn}")
            run.advance(1.0)

    def _seconds(self, run: RunContext, model: Any, arm: Arm, images: torch.Tensor) -> float:
        """Opening the port is no part of it."""
        with self.under(model, arm):
            run.synchronise()
            start = time.perf_counter()
            self.segmented(model, arm, images)
            run.synchronise()
            return time.perf_counter() - start
