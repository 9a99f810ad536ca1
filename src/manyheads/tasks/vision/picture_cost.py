# SPDX-License-Identifier: Apache-2.0
"""Seconds that a classifier of first weights, which cost what any cost, takes for a picture or film."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...costs.clock import Clock
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ...reducing import LearnedReducer
from ._picture_classifiers import PictureClassifierTask

__all__ = ["PictureCost"]


@dataclass(frozen=True, kw_only=True)
class PictureCost(PictureClassifierTask):
    """One round is a batch under every arm in turn, in another order each round, behind a first that is not timed.

    On a CPU seconds are the processor's, of this thread, so that other work on the machine does not count.

    Attributes:
        at_once: pictures of a batch.
        rounds: repetitions.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("seconds", "seconds a picture", "s", kind="time"),)

    at_once: int = 64
    rounds: int = 12

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{i}", 0.02 * len(run.arms), f"seconds, round {i + 1}", {"round": i})
            for i in range(self.rounds)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        turn = unit.params["round"]
        clock = run.kept(("clock", self.key), lambda: Clock(run.device, own=True))
        pixels = run.kept(("timed", self.key), lambda: self.test_pixels(run, self.at_once)[0].to(run.device))
        first = turn % len(run.arms)
        for arm in run.arms[first:] + run.arms[:first]:
            yield self.row("seconds", arm, self._seconds(run, arm, pixels, clock), f"{turn}")
            run.advance(0.02)

    @torch.no_grad()
    def _seconds(self, run: RunContext, arm: Arm, pixels: Tensor, clock: Clock) -> float:
        """Of a picture; opening the port is no part of it."""
        model: Any = run.kept(("timed", self.key, arm.key), lambda: self.fresh(run, arm, 0))
        reducer = self.reducer(arm)
        if isinstance(reducer, LearnedReducer):
            reducer = reducer.having(
                reducer.new_weights(self.dim, model.config.num_hidden_layers).to(run.device).eval()
            )  # fmt: skip
        with use(model, reducer) if reducer is not None else nullcontext():
            model(pixel_values=pixels)
            return clock.seconds(lambda: model(pixel_values=pixels)) / len(pixels)
