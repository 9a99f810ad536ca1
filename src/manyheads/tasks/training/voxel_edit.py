# SPDX-License-Identifier: Apache-2.0
"""Edits of voxel objects by instruction, by editors of each arm trained from scratch, beside the one exact result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...data.voxels import INSTRUCTIONS, Edits, draw, targets
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...models.rectified import Flow
from ...models.voxels import Noisy, VoxelEditor, noisy
from ._editors import EditorTask
from ._flows import TRAINING_LOSS, FlowTask
from ._voxel_scores import judge

__all__ = ["VoxelEdit"]

_AT_ONCE = 64  # objects edited at once


@dataclass(frozen=True, kw_only=True)
class VoxelEdit(EditorTask, FlowTask):
    """Train an editor of every arm on the same edits, and have it edit objects that no training saw.

    Of an edit, ``changed`` are the voxels in which source and target differ. ``edited_iou`` is of output and target
    within these and their neighbours, ``kept_iou`` and ``kept_chamfer`` without them, ``followed`` says whether the
    output is nearer to the asked edit's result than to those of the other three and to the source. Arms of a seed start
    from the same noise. ``options`` of an arm: see the bases.

    Attributes:
        samples: edits that are judged, as many of each instruction.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("edited_iou", "IoU where the edit changes something", higher=True, kind="share"),
        Metric("kept_iou", "IoU where it changes nothing", higher=True, kind="share"),
        Metric("kept_chamfer", "Chamfer distance where it changes nothing", "voxels"),
        Metric("followed", "outputs nearest to what was asked", higher=True, kind="share", floor=0.2),
        Metric("exact", "outputs without a wrong voxel", higher=True, kind="share"),
        TRAINING_LOSS,
    )

    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.samples % len(INSTRUCTIONS):
            raise UserError("as many edits of each of four instructions are judged: give samples that four parts")

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        for seed, editor, rows in self.flows(run, arm):
            yield from rows
            edits = self.judged(run)
            found = torch.cat([self._edited(run, editor, edits, seed, i) for i in range(0, self.samples, _AT_ONCE)])
            for i, values in enumerate(judge(found.cpu(), edits)):
                at = {"instruction": INSTRUCTIONS[int(edits.instruction[i])]}
                for name, value in values.items():
                    yield self.row(name, arm, value, f"{i}", seed=seed, at=at)

    def given(self, run: RunContext, arm: Arm, stage: str, seed: int, step: int) -> Noisy:
        rng = run.torch_rng(training=seed, step=step)
        return self._batch(run, draw(self.batch, self.side, rng, device=run.device), training=seed, step=step)

    def aside(self, run: RunContext, arm: Arm) -> Noisy:
        return self._batch(run, draw(_AT_ONCE, self.side, run.torch_rng(part="aside"), device=run.device), aside=1)

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

    def _edited(self, run: RunContext, editor: Flow | None, edits: Edits, seed: int, first: int) -> Tensor:
        source, told = (x[first : first + _AT_ONCE].to(run.device) for x in edits[:2])
        if not isinstance(editor, VoxelEditor):
            return source
        noise = torch.randn(source.shape, generator=run.torch_rng(part="edits", seed=seed, first=first))
        return editor.edited(source, told, noise.to(run.device), self.denoising)
