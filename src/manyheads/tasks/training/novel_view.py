# SPDX-License-Identifier: Apache-2.0
"""Videos filmed again from other cameras, by models of each arm trained from scratch, beside the exact view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...conditioning import SourceCondition
from ...data.filmed_scenes import Scenes, Shots, draw
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...models.rectified import Flow, fitted
from ...models.refilming import Filmed, Refilmer, RefilmerConfig, noisy
from ._camera_scores import judge
from ._flows import TRAINING_LOSS, FlowTask

__all__ = ["NovelView"]

_AT_ONCE = 64  # videos at once


@dataclass(frozen=True, kw_only=True)
class NovelView(FlowTask):
    """Train a model of every arm on the same shots, and have it film scenes that no training saw along new paths.

    Each frame's camera is found in the scene, which is exactly known. ``rotation_error`` is its angle to the commanded
    one, ``centre_error`` the distance of the two in those of the point they go around, ``pixel_error`` the root mean
    squared error of pixels in -1 to 1; means over the frames of a video. Arms of a seed start from the same noise.
    ``options`` of an arm: see the base; ``copies``, ``source`` or ``proxy``, whose pixels it gives out (the proxy
    enlarged); ``first``, the share of the steps in which no rendering is shown, of a training in two stages;
    ``fitted``, a spec: it has as many parameters as a model of that, by the width of its feed-forward part.

    Attributes:
        side, frames, times, patch, dim, heads, layers: see :class:`manyheads.models.refilming.RefilmerConfig`.
        pool: shots that are trained on, in batches drawn from them.
        samples: videos that are judged.
        denoising: steps of sampling.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("rotation_error", "angle of the camera found to the commanded one", "degrees"),
        Metric("centre_error", "distance of the camera found from the commanded one"),
        Metric("pixel_error", "root mean squared error of pixels"),
        Metric("parameters", "parameters of a model"),
        TRAINING_LOSS,
    )

    side: int = 8
    frames: int = 3
    times: int = 2
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 2
    pool: int = 4096
    samples: int = 64
    denoising: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.pool, self.samples, self.denoising) < 1:
            raise UserError("shots, videos and steps of sampling count from 1")

    def guard(self, run: RunContext) -> None:
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, SourceCondition) or s.recipe != "postcam"]:
                raise UserError(f"{self.name} tells models their cameras, which {wrong[0]} does not; give postcam")

    def config(self, arm: Arm) -> RefilmerConfig:
        """Of an arm's model."""
        sizes = (self.side, self.frames, self.times, self.patch, self.dim, self.heads, self.layers)
        own = RefilmerConfig(*sizes, strategy=arm.full_spec)
        if not (other := arm.options.get("fitted")):
            return own
        with torch.random.fork_rng(devices=[]):
            return fitted(Refilmer, own, Refilmer(replace(own, strategy=other)).parameters_held)

    def fresh(self, run: RunContext, arm: Arm, seed: int) -> Refilmer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            return Refilmer(self.config(arm)).to(run.device)

    def stages(self, arm: Arm, steps: int) -> list[tuple[str, int]]:
        first = round(steps * arm.options.get("first", 0))
        return [(name, count) for name, count in (("poses", first), ("both", steps - first)) if count]

    def given(self, run: RunContext, arm: Arm, stage: str, seed: int, step: int) -> Filmed:
        def make() -> Shots:
            generator, parts = run.torch_rng(part="shots"), list[Shots]()
            for start in range(0, self.pool, _AT_ONCE):
                parts.append(self._drawn(run, min(_AT_ONCE, self.pool - start), generator)[1])
            return Shots(*(torch.cat(x) for x in zip(*parts, strict=True)))

        shots: Shots = run.kept(("pool", self.side, self.frames, self.times, self.pool), make)
        rows = torch.randint(self.pool, (self.batch,), generator=run.torch_rng(training=seed, step=step))
        rows = rows.to(run.device)
        return self._noisy(run, Shots(*(x[rows] for x in shots)), stage != "poses", training=seed, step=step)

    def aside(self, run: RunContext, arm: Arm) -> Filmed:
        return self._noisy(run, self._drawn(run, _AT_ONCE, run.torch_rng(part="aside"))[1], True, aside=1)

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        for seed, flow, rows in self.flows(run, arm):
            yield from rows
            if flow is not None:
                yield self.row("parameters", arm, flow.parameters_held, "training", seed=seed)
            scenes, shots = self.judged(run)
            for i in range(0, self.samples, _AT_ONCE):
                part = slice(i, i + _AT_ONCE)
                some = Shots(*(x[part] for x in shots))
                found = self._filmed(run, arm, flow, some, seed, i)
                for j, values in enumerate(judge(found, scenes.part(part), some), i):
                    for name, value in values.items():
                        yield self.row(name, arm, value, f"{j}", seed=seed)

    def judged(self, run: RunContext) -> tuple[Scenes, Shots]:
        """Scenes that no training saw, and their shots, on the run's device."""
        found: tuple[Scenes, Shots] = run.kept(
            ("judged", self.side, self.frames, self.times, self.samples),
            lambda: self._drawn(run, self.samples, run.torch_rng(part="test")),
        )
        return found

    def _drawn(self, run: RunContext, count: int, generator: torch.Generator) -> tuple[Scenes, Shots]:
        return draw(count, self.side, self.frames, self.times, generator, run.device)

    def _noisy(self, run: RunContext, shots: Shots, rendered: bool, **axes: int) -> Filmed:
        generator = torch.Generator(run.device).manual_seed(run.torch_rng(noise=1, **axes).initial_seed())
        return noisy(shots, generator, rendered)

    def _filmed(self, run: RunContext, arm: Arm, flow: Flow | None, shots: Shots, seed: int, first: int) -> Tensor:
        """What an arm gives out for shots."""
        if not isinstance(flow, Refilmer):
            small = shots.proxy.transpose(1, 2).flatten(0, 1)
            large = interpolate(small, scale_factor=self.times, mode="bilinear", align_corners=False)
            enlarged = large.unflatten(0, (-1, self.frames)).transpose(1, 2)
            return enlarged if arm.options["copies"] == "proxy" else shots.source
        noise = torch.randn(shots.source.shape, generator=run.torch_rng(part="videos", seed=seed, first=first))
        return flow.film(shots.source, shots.cameras, shots.proxy, noise=noise.to(run.device), steps=self.denoising)
