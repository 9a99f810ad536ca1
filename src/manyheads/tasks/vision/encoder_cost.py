# SPDX-License-Identifier: Apache-2.0
"""Seconds that an encoder takes for an image, all arms in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, Vision, WorkUnit
from ...integrations import use

__all__ = ["EncoderCost"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncoderCost(Task):
    """One round is a batch of noise under every arm in turn, in another order each round; first calls are not timed.

    An arm with the option ``downsampled`` is the plain model on images whose sides are that fraction. An arm whose
    strategy, or whose model, refuses the size has no rows of it, and the log says why.

    Attributes:
        sides: of images in pixels.
        batch: images at once.
        rounds: repetitions.
        device: what it is measured on, ``cuda`` where a processor that others use would say nothing; empty for any.
    """

    subject: ClassVar[str] = "vision"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("seconds", "seconds an image", "s", kind="time"),)

    sides: tuple[int, ...] = (224,)
    batch: int = 1
    rounds: int = 3
    device: str = ""

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.device in ("", run.device.type):
            return None
        return f"seconds are compared on {self.device} alone: elsewhere other work shares the machine"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{side}/{i}", len(run.arms) * side**2, f"cost at {side} pixels, round {i + 1}",
                     {"side": side, "round": i})
            for side in self.sides
            for i in range(self.rounds)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        side, turn = unit.params["side"], unit.params["round"]
        first = turn % len(run.arms)
        refused = run.kept(("refused", self.key, side), dict)
        for arm in run.arms[first:] + run.arms[:first]:
            if (arm.key, side) not in refused:
                try:
                    run.kept(("warm", self.key, arm.key, side), partial(self._seconds, run, arm, side))
                    seconds = self._seconds(run, arm, side)
                except UserError as error:
                    refused[arm.key, side] = str(error)
                    _log.warning("%s at %s pixels has no seconds: %s", arm.name, side, error)
                else:
                    yield self.row("seconds", arm, seconds, f"{turn}", at={"side": side})
            run.advance(side**2)

    @torch.no_grad()
    def _seconds(self, run: RunContext, arm: Arm, side: int) -> float:
        """Of an image; opening the port is no part of it."""
        vision = cast(Vision, run.subject)
        model: Any = vision.model
        patch = getattr(model.config, "patch_size", 32)
        small = max(1, round(side * float(arm.options.get("downsampled", 1.0)) / patch)) * patch
        images = torch.randn(self.batch, 3, small, small, generator=run.torch_rng(side=side)).to(
            run.device, model.dtype
        )
        with use(model, *arm.strategies) if arm.strategies else nullcontext():
            run.synchronise()
            start = time.perf_counter()
            vision.encode(images)
            run.synchronise()
            return (time.perf_counter() - start) / self.batch
