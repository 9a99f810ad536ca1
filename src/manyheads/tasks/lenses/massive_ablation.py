# SPDX-License-Identifier: Apache-2.0
"""What a language model loses when its massive activations are zeroed, set to their means, or others zeroed instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...lenses.refined_massive_activations import RefinedMassiveActivations, means
from ...strategy import AttentionWatch, Residual, Strategy
from ..text._text_task import model_of
from ._windows import WindowTask, nll

__all__ = ["MassiveAblation"]

_BATCH = 8  # windows at once


@dataclass(frozen=True, kw_only=True)
class MassiveAblation(WindowTask):
    """The first block with massive activations is found, and their means are taken, on windows of their own.

    Measured are the baseline and the arms that have the option ``replace``: ``zero``, ``mean``, or ``control``, which
    zeroes as many other channels, at random, of the tokens that the massive ones were found at.

    Attributes:
        threshold, ratio: of the detector.
        draws: of the control.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("token_nll", "loss, nats/token", "nats/token"),
        Metric("added_nll", "loss above that of the model as it is", "nats/token"),
        Metric("max_to_median", "largest over median activation of the block"),
        Metric("largest_activation", "largest activation of the block"),
    )

    threshold: float = 100.0
    ratio: float = 1000.0
    draws: int = 3

    def unsupported_reason(self, run: RunContext) -> str | None:
        if reason := super().unsupported_reason(run):
            return reason
        found = self._calibrated(run)
        if found.records["spikes"]:
            return None
        times = found.tables["max / median"].mean[:, 0].max()
        return f"no activation reaches {self.ratio:g} times the median of its block; the greatest is {times:,.0f} times"

    def _arms(self, run: RunContext) -> list[Arm]:
        return [arm for arm in run.arms if arm == run.baseline or "replace" in arm.options]

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, float(self.draws if arm.options.get("replace") == "control" else 1), arm.key)
            for arm in self._arms(run)
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = next(arm for arm in self._arms(run) if arm.key == unit.name)
        plain = cast(Tensor, run.kept("loss as it is", lambda: self._loss(run)))
        mine = self._loss(run, arm)
        yield from self.each("token_nll", arm, mine.tolist())
        yield from self.each("added_nll", arm, (mine.double() - plain.double()).tolist())
        if arm == run.baseline:
            tables, layer = self._calibrated(run).tables, self._layer(run)
            at = tables["max"].layers.index(layer)
            for name, table in (("max_to_median", "max / median"), ("largest_activation", "max")):
                for i, value in enumerate(tables[table].values[:, at, 0]):
                    yield self.row(name, arm, value, f"calibration {i}", about={"layer": layer})
        run.advance(unit.cost)

    def _calibrated(self, run: RunContext) -> Any:
        """What the detector finds on the windows to calibrate with."""

        def find() -> Any:
            import manyheads

            lens, model = RefinedMassiveActivations(threshold=self.threshold, ratio=self.ratio), model_of(run)
            with manyheads.watch(model, lens) as seen, torch.no_grad():
                for ids in self.windows(run, "calibration").split(_BATCH):
                    model(ids[:, :-1])
            return seen.compute()

        return run.kept(("massive", self.threshold, self.ratio), find)

    def _layer(self, run: RunContext) -> int:
        return min(int(spike["layer"]) for spike in self._calibrated(run).records["spikes"])

    def _loss(self, run: RunContext, arm: Arm | None = None) -> Tensor:
        """Mean loss of each window, nats ``[N]``; of several draws of the control their mean."""
        import manyheads

        made = []
        for strategy in self._acting(run, arm):
            with manyheads.use(model_of(run), *([strategy] if strategy else [])):
                made.append(nll(model_of(run), self.windows(run)).mean(1))
        return torch.stack(made).mean(0)

    def _acting(self, run: RunContext, arm: Arm | None) -> list[Strategy | None]:
        how = arm.options.get("replace") if arm else None
        if how is None:
            return [None]
        found, layer = self._calibrated(run), self._layer(run)
        if how == "control":
            spikes = [spike for spike in found.records["spikes"] if spike["layer"] == layer]
            columns, channels = ({int(spike[name]) for spike in spikes} for name in ("column", "channel"))
            seeds = [seeding.number(run.seed, control="massive_ablation", draw=draw) for draw in range(self.draws)]
            return [
                _ZeroOthers(layers=(layer,), columns=tuple(columns), channels=tuple(channels), seed=s) for s in seeds
            ]
        return [
            RefinedMassiveActivations(
                threshold=self.threshold, ratio=self.ratio, layers=(layer,), intervene=how,
                means=means(found) if how == "mean" else "",
            )
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _ZeroOthers(AttentionWatch, Residual):
    """Zeroes as many channels as ``channels`` has, others than those, of the tokens at ``columns``."""

    columns: tuple[int, ...]
    channels: tuple[int, ...]
    seed: int

    def residual(self, site: Any, hidden: Tensor, memory: Any) -> Tensor:
        order = torch.randperm(hidden.shape[2], generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = [channel for channel in order if channel not in self.channels][: len(self.channels)]
        made = hidden.clone()
        for column in self.columns:
            made[:, column, drawn] = 0
        return made

    def watch(self, call: Any, out: Tensor) -> None:
        """Look at nothing."""
