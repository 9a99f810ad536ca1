# SPDX-License-Identifier: Apache-2.0
"""Classes of pictures and films, said by classifiers of each arm that were trained from scratch on its fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...experiment import Metric, Row, RunContext, WorkUnit, seeding
from ...integrations import use
from ...recipes.tokenlearner import train_classifier
from ._picture_classifiers import PictureClassifierTask

__all__ = ["PictureClasses"]


@dataclass(frozen=True, kw_only=True)
class PictureClasses(PictureClassifierTask):
    """A unit trains one arm from one seed; batches and first weights of the model are those of all arms.

    Attributes:
        batch, steps, lr: of a training, by AdamW.
        samples: pictures that are judged.
        at_once: of them in a forward.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "held-out accuracy", higher=True, kind="share"),
        Metric("training_loss", "loss in the last tenth of training, nats/picture", "nats/picture"),
    )  # fmt: skip

    batch: int = 32
    steps: int = 400
    lr: float = 1e-3
    samples: int = 2000
    at_once: int = 100

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.floored(accuracy=1 / self.classes)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{arm.key}/{seed}", 1.0, f"{arm.key}, training {seed + 1}",
                     {"arm": arm.key, "seed": seed})
            for seed in run.seeds
            for arm in run.arms
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), int(unit.params["seed"])
        model = self.fresh(run, arm, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, reducer=seed))
            reducer, state = train_classifier(
                model, lambda step: self.training_batch(run, self.batch, seed, step), self.reducer(arm),
                budget=self.steps, lr=self.lr, on_step=lambda _: run.advance(1 / self.steps),
            )  # fmt: skip
        tail = state.losses[-max(1, len(state.losses) // 10) :]
        about = {"seconds": state.seconds}
        yield self.row("training_loss", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
        pixels, labels = run.kept(("test", self.key), lambda: self.test_pixels(run, self.samples))
        with torch.no_grad(), use(model, reducer) if reducer is not None else nullcontext():
            said = [model(pixel_values=x.to(run.device)).logits.argmax(1).cpu() for x in pixels.split(self.at_once)]
        for i, right in enumerate((torch.cat(said) == labels).tolist()):
            yield self.row("accuracy", arm, right, f"{i}", context=f"{i}", seed=seed)
