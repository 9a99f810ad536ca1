# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train a small rectified flow under every arm: one choice of the rate, the same batches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...models.rectified import Flow
from ...training import TrainState, train_flow

__all__ = ["TRAINING_LOSS", "FlowTask"]

TRAINING_LOSS = Metric("training_loss", "loss in the last tenth of training")


@dataclass(frozen=True, kw_only=True)
class FlowTask(Task):
    """Base of tasks that train flows.

    ``options`` of an arm: ``copies``, true for an arm that has no flow; ``times``, how many times as many steps it is
    trained.

    Attributes:
        batch: samples of a step.
        steps: of a training.
        rates: learning rates that every arm tries, on the first seed, for ``tune_steps``; the least loss on samples set
            aside decides. One alone is taken.
        tune_steps: of a trial.
    """

    subject: ClassVar[str] = "trainable"

    batch: int = 16
    steps: int = 400
    rates: tuple[float, ...] = (3e-3,)
    tune_steps: int = 100

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or min(self.steps, self.tune_steps, self.batch) < 1:
            raise UserError("rates are learning rates above 0, steps and batches count from 1")

    @abstractmethod
    def fresh(self, run: RunContext, arm: Arm, seed: int) -> Flow:
        """An arm's flow with its first weights; those that all have are the same for all arms of a seed."""

    @abstractmethod
    def given(self, run: RunContext, arm: Arm, stage: str, seed: int, step: int) -> Any:
        """A batch of a training on the run's device, the same samples for all arms."""

    @abstractmethod
    def aside(self, run: RunContext, arm: Arm) -> Any:
        """A batch of samples that are set aside for the choice of the rate."""

    def stages(self, arm: Arm, steps: int) -> list[tuple[str, int]]:
        """Parts of a training of ``steps``, each with a schedule of its own: names and steps."""
        return [("", steps)]

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for arm in run.arms:
            trials = self.tune_steps * len(self.rates) if len(self.rates) > 1 else 0
            steps = trials + self.steps_of(arm) * len(run.seeds)
            cost = 1.0 if arm.options.get("copies") else float(steps * self.batch)
            found.append(WorkUnit(self.key, arm.key, cost, f"{arm.key}: {self.name}", {"arm": arm.key}))
        return found

    def steps_of(self, arm: Arm) -> int:
        """Steps of an arm's training."""
        times: float = arm.options.get("times", 1)
        return round(self.steps * times)

    def rate(self, run: RunContext, arm: Arm) -> float:
        """The learning rate of an arm."""
        if len(self.rates) == 1:
            return self.rates[0]
        losses = {}
        for rate in self.rates:
            flow, _ = self.trained(run, arm, run.seeds[0], rate, self.tune_steps)
            with torch.no_grad():
                losses[rate] = float(flow.loss(self.aside(run, arm)))
        return min(losses, key=lambda rate: (not math.isfinite(losses[rate]), losses[rate]))

    def trained(self, run: RunContext, arm: Arm, seed: int, rate: float, steps: int) -> tuple[Flow, TrainState]:
        """An arm's flow after ``steps``, and the state of its last stage."""
        flow, done, state = self.fresh(run, arm, seed), 0, None
        for stage, count in self.stages(arm, steps):

            def get_batch(step: int, first: int = done, stage: str = stage) -> Any:
                return self.given(run, arm, stage, seed, first + step)

            state = train_flow(
                flow, get_batch, count, rate, lambda _: run.advance(self.batch), warmup=max(1, count // 20)
            )  # fmt: skip
            done += count
        if state is None:
            raise UserError(f"{arm.key} is trained for no steps")
        return flow, state

    def flows(self, run: RunContext, arm: Arm) -> Iterator[tuple[int, Flow | None, list[Row]]]:
        """Of every seed: the trained flow, or None for an arm without one, and what is to be told of its training."""
        rate = None if arm.options.get("copies") else self.rate(run, arm)
        for seed in run.seeds:
            if rate is None:
                yield seed, None, []
                continue
            flow, state = self.trained(run, arm, seed, rate, self.steps_of(arm))
            tail = state.losses[-max(1, len(state.losses) // 10) :]
            about = {"rate": rate, "seconds": state.seconds, "parameters": flow.parameters_held}
            yield seed, flow, [
                self.row("training_loss", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
            ]  # fmt: skip
