# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train a small model first: an ordinary Llama, a unit for each training, and its progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from ...experiment import Arm, RunContext, Task, WorkUnit
from ...training import TrainState

__all__ = ["TrainedTask", "told"]

_EVERY = 20  # steps between two reports of progress
_TRAINING = 0.9  # of the cost of a unit; the rest is judging


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTask(Task):
    """Base of the tasks that train: a unit for each seed, or for each seed and arm where arms are trained apart.

    Attributes:
        steps: of a training.
    """

    subject: ClassVar[str] = "trainable"
    apart: ClassVar[bool] = True  # whether every arm is a training of its own

    steps: int = 600

    def trained_arms(self, run: RunContext) -> list[Arm]:
        """Arms that this task is about."""
        return list(run.arms)

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.steps)
        if not self.apart:
            return [WorkUnit(self.key, f"{s}", cost, f"training, seed {s}", {"seed": s}) for s in run.seeds]
        return [
            WorkUnit(
                self.key, f"{seed}/{arm.key}", cost, f"training {arm.key}, seed {seed}", {"seed": seed, "arm": arm.key}
            )
            for seed in run.seeds
            for arm in self.trained_arms(run)
        ]  # fmt: skip


def told(run: RunContext, unit: WorkUnit, steps: int) -> Callable[[TrainState], None]:
    """An ``on_step`` that reports the share of the unit's cost that goes into ``steps`` of training."""

    def on_step(state: TrainState) -> None:
        if state.step % _EVERY == 0:
            run.advance(_EVERY * _TRAINING * unit.cost / steps)

    return on_step
