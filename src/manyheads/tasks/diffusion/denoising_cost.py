# SPDX-License-Identifier: Apache-2.0
"""Seconds of an image, and the share of the attention modules that are run, all arms in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...experiment import Metric, Row, RunContext, WorkUnit
from ._attention_counts import computed
from ._image_task import ImageTask, pipe_of

__all__ = ["DenoisingCost"]


@dataclass(frozen=True, kw_only=True)
class DenoisingCost(ImageTask):
    """One round is one batch under every arm in turn, in another order each round; the first call of all is not timed.

    Attributes:
        rounds: repetitions.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("seconds", "seconds an image", "s", kind="time"),
        Metric("attention", "attention computed", kind="mean"),
    )

    rounds: int = 3
    samples: int = 2

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{i}", len(run.arms), f"cost, round {i + 1}", {"round": i}) for i in range(self.rounds)
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...integrations.diffusers import denoisers

        turn, model = unit.params["round"], denoisers(pipe_of(run))[0][1]

        def timed(arm: object) -> tuple[float, int]:
            with computed(model) as counts:
                run.synchronise()
                start = time.perf_counter()
                self.images(run, arm, 0, 0, self.samples)  # type: ignore[arg-type]
                run.synchronise()
                return time.perf_counter() - start, sum(counts.values())

        run.kept("warm-up of images", lambda: timed(run.baseline))
        first = turn % len(run.arms)
        found = {arm.key: (arm, *timed(arm)) for arm in run.arms[first:] + run.arms[:first]}
        whole = found[run.baseline.key][2]
        for arm, seconds, queries in found.values():
            yield self.row("seconds", arm, seconds / self.samples, f"{turn}")
            if whole:
                yield self.row("attention", arm, queries / whole, f"{turn}")
        run.advance(unit.cost)
