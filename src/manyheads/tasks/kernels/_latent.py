# SPDX-License-Identifier: Apache-2.0
"""What the tasks on latent attention share: the layer's sizes, and which schedule an arm stands for."""

from __future__ import annotations

from ...attention.mla import Dims
from ...experiment import Arm, RunContext
from ...spec import read

__all__ = ["SMALL", "dims", "schedule_of", "unsupported"]

SMALL = (16, 128, 32, 16, 32, 384)  # a quarter of DeepSeek-V3's channels and an eighth of its heads


def dims(sizes: tuple[int, ...]) -> Dims:
    """A layer whose queries come projected, as inside a model."""
    heads, rank, nope, rope, value, _ = sizes
    return Dims(heads, rank, nope, rope, value)


def schedule_of(arm: Arm) -> str:
    """``expand`` for the plain subject, which is what transformers does; else what its spec says."""
    return read(arm.spec).fields.get("schedule", "auto") if arm.spec else "expand"


def unsupported(run: RunContext) -> str | None:
    """Why an arm of ``run`` is no schedule of latent attention."""
    for arm in run.arms:
        if arm.spec and read(arm.spec).name != "mla_hw":
            return f"{arm.key} is no schedule of latent attention; give mla_hw with schedule=absorb, expand or auto"
    return None
