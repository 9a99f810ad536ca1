# SPDX-License-Identifier: Apache-2.0
"""What tasks on editors of voxels share: their sizes, and an arm's editor with its first weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...conditioning import SourceCondition
from ...errors import UserError
from ...experiment import Arm, RunContext, Task, seeding
from ...models.rectified import fitted
from ...models.voxels import EditorConfig, VoxelEditor

__all__ = ["EditorTask"]


@dataclass(frozen=True, kw_only=True)
class EditorTask(Task):
    """Base of tasks on editors of voxels; an arm without a strategy sees no source.

    ``options`` of an arm: ``fitted``, true for a feed-forward width by which it has as many parameters as an editor
    that sees no source; ``copies``, true for an arm that leaves every object as it is and has no editor.

    Attributes:
        side, patch, dim, heads, layers: see :class:`manyheads.models.voxels.EditorConfig`.
        denoising: steps of an edit.
    """

    subject: ClassVar[str] = "trainable"

    side: int = 8
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 3
    denoising: int = 10

    def guard(self, run: RunContext) -> None:
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, SourceCondition)]:
                raise UserError(f"{self.name} trains editors, on which {wrong[0]} does not act; give native3d_edit")

    def config(self, arm: Arm) -> EditorConfig:
        """Of an arm's editor."""
        plain = EditorConfig(self.side, self.patch, self.dim, self.heads, self.layers, strategy="")
        own = replace(plain, strategy=arm.full_spec)
        if not arm.options.get("fitted"):
            return own
        with torch.random.fork_rng(devices=[]):
            return fitted(VoxelEditor, own, VoxelEditor(plain).parameters_held)

    def fresh(self, run: RunContext, arm: Arm, seed: int) -> VoxelEditor:
        """An arm's editor with its first weights; those that all editors have are the same for all arms of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            return VoxelEditor(self.config(arm)).to(run.device)

    def editors(self, run: RunContext) -> list[Arm]:
        """Arms that have an editor."""
        return [arm for arm in run.arms if not arm.options.get("copies")]
