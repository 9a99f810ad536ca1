# SPDX-License-Identifier: Apache-2.0
"""How near an arm's videos are to the pipeline's own, beside other ways to spend as few FLOPs: fewer steps, caches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations.diffusers_caches import KNOBS, diffusers_cache, magnitude_ratios
from ._image_task import ImageTask, pipe_of
from .fidelity import psnr

__all__ = ["FEWER", "EqualFlops"]

FEWER = "fewer steps"
Way = tuple[int, float]  # steps, and the knob of a cache


@dataclass(frozen=True, kw_only=True)
class EqualFlops(ImageTask):
    """Rows of the arms, and of the baseline run in other ways (``at={"way": ...}``) that cost no more than ``arm``.

    FLOPs are counted on one video of its own draw: of each way the dearest setting is taken that costs no more than the
    arm does, and its cheapest one where all cost more (``flops`` tells). Fewer steps are the whole schedule with fewer
    steps; caches are diffusers'.

    Attributes:
        arm: whose FLOPs are not exceeded.
        caches: names of diffusers' caches, see :mod:`manyheads.integrations.diffusers_caches`.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("psnr", "PSNR to the plain video, dB", "dB", higher=True),
        Metric("flops", "share of the plain FLOPs"),
    )

    arm: str = ""
    caches: tuple[str, ...] = tuple(KNOBS)

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.arm not in {arm.name for arm in run.arms}:
            return f"there is no arm {self.arm!r} whose FLOPs others could be given"
        return super().unsupported_reason(run)

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed, first, last = (unit.params[name] for name in ("seed", "first", "last"))
        plain = self.images(run, run.baseline, seed, first, last)
        costs: dict[str, float] = run.kept((self.key, "flops"), lambda: self._costs(run))
        for arm in run.arms:
            made = plain if arm is run.baseline else self.images(run, arm, seed, first, last)
            found = {"psnr": psnr(made, plain), "flops": torch.full((len(made),), costs[arm.key])}
            yield from self._told(arm, "arm", seed, found, first)
        ways: dict[str, tuple[Way, float]] = run.kept((self.key, "ways"), lambda: self._ways(run, costs))
        for name, ((steps, knob), cost) in ways.items():
            made = self._made(run, name, steps, knob, seed, first, last)
            found = {"psnr": psnr(made, plain), "flops": torch.full((len(made),), cost)}
            yield from self._told(run.baseline, name, seed, found, first)
        run.advance(unit.cost)

    def _told(self, arm: Arm, way: str, seed: int, found: dict[str, Tensor], first: int) -> Iterator[Row]:
        for metric, values in found.items():
            for i, value in enumerate(values.tolist(), first):
                yield self.row(metric, arm, value, f"{i}", seed=seed, context=f"{seed}.{i}", at={"way": way})

    def _made(
        self, run: RunContext, name: str, steps: int, knob: float, seed: int, first: int, last: int,
        draw: str = "judged",
    ) -> Tensor:  # fmt: skip
        """Videos of the plain pipeline in another way."""
        task = replace(self, steps=steps)
        way: AbstractContextManager[None] = nullcontext()
        if name != FEWER:
            ratios = run.kept((self.key, "ratios"), lambda: self._ratios(run)) if name == "magcache" else None
            way = diffusers_cache(pipe_of(run), name, knob, steps, ratios)
        with way:
            return task.images(run, run.baseline, seed, first, last, acting=(), draw=draw)

    def _ratios(self, run: RunContext) -> list[float]:
        return magnitude_ratios(pipe_of(run), lambda: self._made(run, FEWER, self.steps, 0, 0, 0, 1, "calibrated"))

    def _costs(self, run: RunContext) -> dict[str, float]:
        """Share of the plain FLOPs by arm."""

        def spent(arm: Arm) -> float:
            with _counted() as counter:
                self.images(run, arm, 0, 0, 1, draw="calibrated")
            return float(counter.get_total_flops())

        whole = spent(run.baseline)
        return {arm.key: 1.0 if arm is run.baseline else spent(arm) / whole for arm in run.arms}

    def _ways(self, run: RunContext, costs: dict[str, float]) -> dict[str, tuple[Way, float]]:
        most = next(costs[arm.key] for arm in run.arms if arm.name == self.arm)
        with _counted() as counter:
            self._made(run, FEWER, self.steps, 0, 0, 0, 1, "calibrated")
        whole, steps = counter.get_total_flops(), max(1, int(self.steps * most))
        found: dict[str, tuple[Way, float]] = {FEWER: ((steps, 0.0), steps / self.steps)}
        for name in self.caches:

            def share(knob: float, name: str = name) -> float:
                with _counted() as counter:
                    self._made(run, name, self.steps, knob, 0, 0, 1, "calibrated")
                return float(counter.get_total_flops() / whole)

            knobs, careful, daring = KNOBS[name], 0, len(KNOBS[name]) - 1
            while careful < daring:  # a more daring knob costs no more: halve what is left
                middle = (careful + daring) // 2
                if share(knobs[middle]) <= most:
                    daring = middle
                else:
                    careful = middle + 1
            found[name] = (self.steps, knobs[careful]), share(knobs[careful])
        return found


@contextlib.contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    """Count FLOPs, of dense attention too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
