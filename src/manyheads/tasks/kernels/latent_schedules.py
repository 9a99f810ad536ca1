# SPDX-License-Identifier: Apache-2.0
"""Seconds of attention over latents by schedule, over a grid of shapes, and what choosing by a roofline model costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar, cast

import torch

from ...attention import mla
from ...costs.clock import Clock
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...spec import read
from ._latent import LatentTask

__all__ = ["LatentSchedules"]

_WAYS: tuple[mla.Schedule, ...] = ("expand", "absorb")


@dataclass(frozen=True, kw_only=True)
class LatentSchedules(LatentTask):
    """Both schedules on random tensors, in turns; an arm has the times of the one that it names.

    ``auto`` names by the roofline model from the peak and bandwidth measured just before; it is never fitted to the
    times that it has to predict. ``agrees`` is 1 where the named one was the faster, ``regret`` how much more it cost
    than the faster, both by the shortest time.

    Attributes:
        batches: rows of a batch, ascending.
        queries: new tokens of each row.
        tokens: held of each row, ascending.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("attention", "latent attention, s", "s", kind="time"),
        Metric("agrees", "faster schedule named", higher=True, kind="share"),
        Metric("regret", "time above the faster's"),
    )

    batches: tuple[int, ...] = (1, 4)
    queries: tuple[int, ...] = (1, 4, 16, 64, 256)
    tokens: tuple[int, ...] = (256, 1024, 4096)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(
                self.key, f"{rows}x{queries}x{tokens}", rows * (tokens + queries**0.5 * 64),
                f"{queries} queries, {rows} x {tokens} tokens", {"shape": [rows, queries, tokens]},
            )
            for rows, queries, tokens in product(self.batches, self.queries, self.tokens)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        rows, queries, tokens = unit.params["shape"]
        clock = run.kept("clock", lambda: Clock(run.device))
        platform = run.kept("platform", clock.calibrate)
        with torch.inference_mode():
            times = self._times(clock, rows, queries, tokens)
        best = {way: min(spent) for way, spent in times.items()}
        at = {
            "queries": queries, "rows": rows, "tokens": tokens,
            "largest": (rows, tokens) == (self.batches[-1], self.tokens[-1]),
        }  # fmt: skip
        named = mla.choose(
            self._layer, rows, queries, tokens, platform, torch.finfo(clock.dtype).bits // 8, among=_WAYS
        )
        for arm in run.arms:
            # The plain subject expands, which is what transformers does.
            way = read(arm.spec).fields.get("schedule", "auto") if arm.spec else "expand"
            way = cast(mla.Schedule, named if way == "auto" else way)
            for i, spent in enumerate(times[way]):
                yield self.row("attention", arm, spent, f"{unit.name}.{i}", at=at, about={"schedule": way})
            yield self.row("agrees", arm, best[way] == min(best.values()), unit.name, at=at)
            yield self.row("regret", arm, best[way] / min(best.values()) - 1, unit.name, at=at)

    @property
    def _layer(self) -> mla.Dims:
        """A layer whose queries come projected, as inside a model."""
        return mla.Dims(*self.sizes[:5])

    def _times(self, clock: Clock, rows: int, queries: int, tokens: int) -> dict[mla.Schedule, list[float]]:
        """Seconds of each schedule, on tensors such that what is made of them has unit size."""
        layer = self._layer
        q = clock.draw(rows, layer.num_heads, queries, layer.nope_dim + layer.rope_dim)
        cache = clock.draw(rows, 1, tokens, layer.rank + layer.rope_dim)
        up = clock.draw(layer.num_heads, layer.nope_dim + layer.v_dim, layer.rank) * layer.rank**-0.5
        scale = (layer.nope_dim + layer.rope_dim) ** -0.5
        work = {way: partial(getattr(mla, way), q, cache, up, layer, scale=scale) for way in _WAYS}
        times: dict[mla.Schedule, list[float]] = {way: [] for way in _WAYS}
        for turn in range(self.repeats + 1):
            for way in _WAYS:
                spent = clock.seconds(work[way])
                if turn:  # the first turn warms up
                    times[way].append(spent)
        return times
