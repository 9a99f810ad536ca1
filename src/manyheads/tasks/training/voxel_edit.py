# SPDX-License-Identifier: Apache-2.0
"""Edits of voxel objects by instruction, by editors of each arm trained from scratch, beside the one exact result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data.voxels import INSTRUCTIONS, Edits, draw, targets
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...models.voxels import Noisy, VoxelEditor, noisy
from ...recipes.native3d_edit import train_editor
from ...training import TrainState
from ._editors import EditorTask
from ._voxel_scores import judge

__all__ = ["VoxelEdit"]

_AT_ONCE = 64  # objects edited at once


@dataclass(frozen=True, kw_only=True)
class VoxelEdit(EditorTask):
    """Train an editor of every arm on the same edits, and have it edit objects that no training saw.

    Of an edit, ``changed`` are the voxels in which source and target differ. ``edited_iou`` is of output and target
    within these and their neighbours, ``kept_iou`` and ``kept_chamfer`` without them, ``followed`` says whether the
    output is nearer to the asked edit's result than to those of the other three and to the source. Arms of a seed start
    from the same noise. ``options`` of an arm: see the base; ``times``, how many times as many steps it is trained.

    Attributes:
        batch: edits of a step.
        steps: of a training.
        rates: learning rates that every arm tries, on the first seed, for ``tune_steps``; the least loss on edits set
            aside decides. One alone is taken.
        tune_steps: of a trial.
        samples: edits that are judged, as many of each instruction.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("edited_iou", "IoU where the edit changes something", higher=True, kind="share"),
        Metric("kept_iou", "IoU where it changes nothing", higher=True, kind="share"),
        Metric("kept_chamfer", "Chamfer distance where it changes nothing", "voxels"),
        Metric("followed", "outputs nearest to what was asked", higher=True, kind="share", floor=0.2),
        Metric("exact", "outputs without a wrong voxel", higher=True, kind="share"),
        Metric("training_loss", "loss in the last tenth of training"),
    )

    batch: int = 16
    steps: int = 400
    rates: tuple[float, ...] = (3e-3,)
    tune_steps: int = 100
    samples: int = 64

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or min(self.steps, self.tune_steps, self.batch) < 1:
            raise UserError("rates are learning rates above 0, steps and batches count from 1")
        if self.samples < 1 or self.samples % len(INSTRUCTIONS):
            raise UserError("as many edits of each of four instructions are judged: give samples that four parts")

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for arm in run.arms:
            trials = self.tune_steps * len(self.rates) if len(self.rates) > 1 else 0
            steps = trials + round(self.steps * arm.options.get("times", 1)) * len(run.seeds)
            cost = 1.0 if arm.options.get("copies") else float(steps * self.batch)
            found.append(WorkUnit(self.key, arm.key, cost, f"{arm.key}: editors", {"arm": arm.key}))
        return found

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        rate = None if arm.options.get("copies") else self.rate(run, arm)
        for seed in run.seeds:
            editor, about = None, dict[str, Any]()
            if rate is not None:
                editor, state = self.trained(run, arm, seed, rate, round(self.steps * arm.options.get("times", 1)))
                tail = state.losses[-max(1, len(state.losses) // 10) :]
                about = {"rate": rate, "seconds": state.seconds, "parameters": editor.parameters_held}
                yield self.row("training_loss", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
            edits = self.judged(run)
            found = torch.cat([self._edited(run, editor, edits, seed, i) for i in range(0, self.samples, _AT_ONCE)])
            for i, values in enumerate(judge(found.cpu(), edits)):
                at = {"instruction": INSTRUCTIONS[int(edits.instruction[i])]}
                for name, value in values.items():
                    yield self.row(name, arm, value, f"{i}", seed=seed, at=at)

    def rate(self, run: RunContext, arm: Arm) -> float:
        """The learning rate of an arm."""
        if len(self.rates) == 1:
            return self.rates[0]
        aside = self._batch(run, draw(_AT_ONCE, self.side, run.torch_rng(part="aside"), device=run.device), aside=1)
        losses = {}
        for rate in self.rates:
            editor, _ = self.trained(run, arm, run.seeds[0], rate, self.tune_steps)
            with torch.no_grad():
                losses[rate] = float(editor.loss(aside))
        return min(losses, key=lambda rate: (not math.isfinite(losses[rate]), losses[rate]))

    def trained(
        self, run: RunContext, arm: Arm, seed: int, rate: float, steps: int
    ) -> tuple[VoxelEditor, TrainState]:  # fmt: skip
        """An arm's editor after ``steps``, on edits that are the same for all arms."""
        editor = self.fresh(run, arm, seed)

        def get_batch(step: int) -> Noisy:
            rng = run.torch_rng(training=seed, step=step)
            return self._batch(run, draw(self.batch, self.side, rng, device=run.device), training=seed, step=step)

        state = train_editor(
            editor, get_batch, steps, rate, lambda _: run.advance(self.batch), warmup=max(1, steps // 20)
        )  # fmt: skip
        return editor, state

    def judged(self, run: RunContext) -> Edits:
        """Edits of held-out objects on the CPU, instructions in turn."""

        def make() -> Edits:
            source = draw(self.samples, self.side, run.torch_rng(part="test"), "test").source
            told = torch.arange(self.samples) % len(INSTRUCTIONS)
            return Edits(source, told, targets(source)[torch.arange(self.samples), told])

        found: Edits = run.kept(("edits", self.side, self.samples), make)
        return found

    def _batch(self, run: RunContext, edits: Edits, **axes: int) -> Noisy:
        generator = torch.Generator(run.device).manual_seed(run.torch_rng(noise=1, **axes).initial_seed())
        return noisy(edits, generator)

    def _edited(self, run: RunContext, editor: VoxelEditor | None, edits: Edits, seed: int, first: int) -> Tensor:
        source, told = (x[first : first + _AT_ONCE].to(run.device) for x in edits[:2])
        if editor is None:
            return source
        noise = torch.randn(source.shape, generator=run.torch_rng(part="edits", seed=seed, first=first))
        return editor.edited(source, told, noise.to(run.device), self.denoising)
