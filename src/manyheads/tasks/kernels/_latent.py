# SPDX-License-Identifier: Apache-2.0
"""What the tasks on latent attention share: the layer's sizes, and which arms they can time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import UserError
from ...experiment import RunContext, Task
from ...spec import read

__all__ = ["LatentTask"]


@dataclass(frozen=True, kw_only=True)
class LatentTask(Task):
    """Base of tasks that time latent attention.

    Attributes:
        sizes: heads, rank, nope, rope, value and query-latent channels of a layer; a quarter of DeepSeek-V3's channels
            and an eighth of its heads where not given.
        repeats: times that everything is measured.
    """

    alone: ClassVar[bool] = True
    subject: ClassVar[str] = "machine"

    sizes: tuple[int, ...] = (16, 128, 32, 16, 32, 384)
    repeats: int = 6

    def __post_init__(self) -> None:
        if len(self.sizes) != 6 or self.repeats < 1:
            raise UserError("sizes are heads, rank, nope, rope, value and query channels; repeats is at least 1")

    def unsupported_reason(self, run: RunContext) -> str | None:
        for arm in run.arms:
            if arm.spec and read(arm.spec).name != "mla_hw":
                return f"{arm.key} is no schedule of latent attention; give mla_hw with schedule=absorb, expand or auto"
        return None
