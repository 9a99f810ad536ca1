# SPDX-License-Identifier: Apache-2.0
"""How much of a denoiser's own attention falls on the blocks that a block-sparse strategy would read, at how many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor

from ...attention.reference import repeat_kv
from ...call import AttentionCall, Site
from ...diffusion.video_blade import VideoBlade
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...strategy import AttentionWatch
from ._image_task import ImageTask, pipe_of

__all__ = ["AttentionKept"]


@dataclass(frozen=True, kw_only=True)
class AttentionKept(ImageTask):
    """Mean over modules, steps, heads and queries of the dense attention on what is read; the pipeline itself is dense.

    Attributes:
        every: steps from one that is looked at to the next.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("kept", "attention on blocks that are read", higher=True, kind="share"),
        Metric("read", "share of the blocks that is read"),
    )

    every: int = 4
    batch: int = 1

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not any(_sparse(arm) for arm in run.arms):
            return "no arm chooses blocks, as video_blade does"
        return super().unsupported_reason(run)

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        seed, first, last = (unit.params[name] for name in ("seed", "first", "last"))
        arms = [arm for arm in run.arms if _sparse(arm)]
        watcher = _Watcher(strategies=tuple(cast(VideoBlade, arm.strategy) for arm in arms), every=self.every)
        with manyheads.use(pipe_of(run), watcher):
            self.images(run, run.baseline, seed, first, last, acting=())
        for number, sums in watcher.found.items():
            for metric in ("kept", "read"):
                arm, value = arms[number], sums[metric] / sums["calls"]
                yield self.row(metric, arm, value, f"{first}", seed=seed, context=f"{seed}.{first}")
        run.advance(unit.cost)


def _sparse(arm: Arm) -> bool:
    return any(isinstance(strategy, VideoBlade) for strategy in arm.strategies)


@dataclass(frozen=True, kw_only=True)
class _Watcher(AttentionWatch):
    """Sums for each strategy the attention that lies on what it would read."""

    strategies: tuple[VideoBlade, ...]
    every: int
    found: dict[int, dict[str, float]] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return any(strategy.selects(site) for strategy in self.strategies)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        if call.diffusion is None or (call.diffusion.index or 0) % self.every:
            return
        weights: Tensor | None = None
        for number, strategy in enumerate(self.strategies):
            own = call.replace(state=call.state.setdefault(strategy.spec, {}))
            if not strategy.selects(call.site) or strategy.refusal(own) is not None:
                continue
            if weights is None:
                k = repeat_kv(call.k, call.q.shape[1])
                logits = call.q.float() @ k.float().transpose(2, 3) * call.scale
                allowed = call.allowed()
                weights = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
            plan = strategy.plan(own)
            mask = plan.pattern.to_mask()
            ordered = weights[:, :, plan.order][:, :, :, plan.order]
            sums = self.found.setdefault(number, dict.fromkeys(("kept", "read", "calls"), 0.0))
            sums["kept"] += float((ordered * mask).sum(-1).mean())
            sums["read"] += plan.pattern.blocks().float().mean().item()
            sums["calls"] += 1
