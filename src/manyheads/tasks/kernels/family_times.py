# SPDX-License-Identifier: Apache-2.0
"""Seconds of the families of attention by length, and how near the cost model comes to them.

The model gets the product rate, the bandwidth by size and the launch that were measured just before, and nothing else:
it is never fitted to the times that it has to predict. An arm is a model, whole or with a part left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf, log2
from typing import Any, ClassVar

import numpy as np
import torch

from ...attention.mla import Platform, seconds
from ...costs import Layer, crossover
from ...costs.clock import Clock
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ._operators import OPERATORS

__all__ = ["FamilyTimes", "rank_correlation"]

_PARTS: dict[str, Any] = {
    "FLOPs": {"bandwidth": inf, "rates": ()}, "bytes": {"peak_flops": inf}, "launches": {"overhead": 0.0},
    "caches": {"rates": ()},
}  # fmt: skip
_GRID = [1 << power for power in range(4, 27)]  # tokens between which the model is asked for a crossover


@dataclass(frozen=True, kw_only=True)
class FamilyTimes(Task):
    """All operators at all lengths, in turns; the shortest time of each counts, on a CPU the processor's of one thread.

    An arm's option ``only`` leaves the other resource out (``FLOPs``, ``bytes``), ``without`` a part (``launches``, or
    ``caches``: one bandwidth for all sizes), and ``shuffled`` gives every operator what is predicted of another one.

    Attributes:
        heads, channels: of the layer.
        lengths: tokens of a sequence, ascending.
        held: tokens of a cache, ascending.
        repeats: times that everything is measured.
    """

    alone: ClassVar[bool] = True
    subject: ClassVar[str] = "machine"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("reading", "sequences: |log2(predicted / measured)|"),
        Metric("token", "tokens: |log2(predicted / measured)|"),
        Metric("rank", "order of families by time: Spearman's correlation", higher=True),
        Metric("crossover", "crossover with full attention: |log2(predicted / measured)|"),
        Metric("bias", "log2(predicted / measured)"),
        Metric("seconds", "measured, s", "s", kind="time"),
    )

    heads: int = 2
    channels: int = 64
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    held: tuple[int, ...] = (1024, 4096, 16384, 65536)
    repeats: int = 5

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, "sequences", sum(n * n for n in self.lengths) / 1e4, "sequences", {"decodes": False}),
            WorkUnit(self.key, "tokens", float(sum(self.held)) / 1e2, "one more token", {"decodes": True}),
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        decodes = unit.params["decodes"]
        names = [name for name, one in OPERATORS.items() if one.decodes == decodes]
        grid = self.held if decodes else self.lengths
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            clock = Clock(run.device, own=True)
            platform = replace(clock.calibrate(), rates=clock.rates())
            with torch.inference_mode():
                best = {length: self._best(clock, names, length) for length in grid}
        finally:
            torch.set_num_threads(threads)
        metric, place = ("token", "token of") if decodes else ("reading", "operator")
        for length, times in best.items():
            for name, spent in times.items():
                at = {place: name, "length": length}
                yield self.row("seconds", run.baseline, spent, f"{name}.{length}", context=name, at=at)
        for arm in run.arms:
            order = self._shuffled(run, names, unit) if arm.options.get("shuffled") else names
            pairs = dict(zip(names, order, strict=True))

            def said(name: str, length: int, arm: Arm = arm, pairs: Mapping[str, str] = pairs) -> float:
                return self._predicted(pairs[name], length, _seen(platform, arm), clock)

            for length, times in best.items():
                for name, spent in times.items():
                    apart = log2(said(name, length) / spent)
                    yield self.row(metric, arm, abs(apart), f"{name}.{length}", context=name)
                    if arm is run.baseline:
                        where = {place: name, "length": length}
                        yield self.row("bias", arm, apart, f"{name}.{length}", context=name, at=where)
                found = rank_correlation([said(name, length) for name in times], list(times.values()))
                yield self.row("rank", arm, found, f"{unit.name}.{length}")
            yield from self._crossings(arm, best, said, names)

    def _layer(self, name: str, length: int, clock: Clock) -> Layer:
        return Layer(
            length=length, heads=self.heads, kv_heads=self.heads, head_dim=self.channels,
            itemsize=torch.finfo(clock.dtype).bits // 8, causal=OPERATORS[name].causal,
        )  # fmt: skip

    def _best(self, clock: Clock, names: list[str], length: int) -> dict[str, float]:
        """The shortest time of each operator, all in turns; the first turn warms up."""
        times: dict[str, list[float]] = {name: [] for name in names}
        work = {name: OPERATORS[name].make(clock, self._layer(name, length, clock)) for name in names}
        for turn in range(self.repeats + 1):
            for name, one in work.items():
                spent = clock.seconds(one)
                if turn:
                    times[name].append(spent)
        return {name: min(spent) for name, spent in times.items()}

    def _predicted(self, name: str, length: int, platform: Platform, clock: Clock) -> float:
        return seconds(OPERATORS[name].stages(self._layer(name, length, clock), platform.fused_heads), platform)

    def _shuffled(self, run: RunContext, names: list[str], unit: WorkUnit) -> list[str]:
        """The names in another order, in which none keeps its place."""
        draws = run.rng(shuffled=unit.name)
        while True:
            order = [names[i] for i in draws.permutation(len(names))]
            if not any(a == b for a, b in zip(names, order, strict=True)):
                return order

    def _crossings(self, arm: Arm, best: Any, said: Any, names: list[str]) -> Iterator[Row]:
        """From which length each operator is cheaper than full attention, where the grid shows it."""
        grid, (full, *others) = list(best), names
        for name in others:
            found = crossover(grid, *([best[n][one] for n in grid] for one in (full, name)))
            times = [[said(one, n) for n in _GRID] for one in (full, name)]
            start = sum(n <= grid[-1] for n in _GRID)  # up to the longest that was measured, or else beyond
            ways = (crossover(_GRID[:n], times[0][:n], times[1][:n]) for n in range(start, len(_GRID) + 1))
            predicted = max(next((way for way in ways if way < inf), _GRID[-1]), _GRID[0])
            if found in (0.0, inf):  # beyond the grid: an error is that to its edge, at least
                edge = float(grid[0] if found == 0 else grid[-1])
                if (predicted <= edge) == (found == 0):
                    continue
                found = edge
            about = {"measured": found, "predicted": predicted}
            yield self.row("crossover", arm, abs(log2(predicted / found)), name, about=about)


def _seen(platform: Platform, arm: Arm) -> Platform:
    """The platform as the model of an arm sees it."""
    left = _PARTS.get(str(arm.options.get("only", "")), {}) | _PARTS.get(str(arm.options.get("without", "")), {})
    return replace(platform, **left)


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's correlation; equal values share their ranks."""
    ranks = [np.array([(np.array(x) < v).sum() + (np.array(x) == v).sum() / 2 for v in x]) for x in (first, second)]
    a, b = (r - r.mean() for r in ranks)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
