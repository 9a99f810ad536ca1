# SPDX-License-Identifier: Apache-2.0
"""Which object each pixel shows, said by a SegFormer that was trained on such pictures and then has fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data import scenes
from ...data.object_scenes import draw_pictures, pixel_labels
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...training import decay, fit
from ._segmenters import SegmenterTask

__all__ = ["SceneSegmentation", "mean_iou"]

_ARM = 0.02  # what an arm costs, in that of a training


@dataclass(frozen=True, kw_only=True)
class SceneSegmentation(SegmenterTask):
    """A unit for each seed: a training without any strategy, and every arm on the same weights and pictures.

    Attributes:
        grid: cells of a picture's side, at most one object in each.
        cell: pixels of a cell's side.
        batch, steps, lr: of the training, by AdamW.
        samples: pictures that are judged.
        at_once: of them in a forward.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("iou", "intersection over union", higher=True, kind="share", floor=0.3,
               what="mean over the objects of a picture and its background, nothing else is counted"),
        Metric("training_loss", "loss in the last tenth of training, nats/pixel", "nats/pixel"),
    )  # fmt: skip

    grid: int = 4
    cell: int = 32
    batch: int = 8
    steps: int = 300
    lr: float = 3e-3
    samples: int = 64
    at_once: int = 16

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not scenes.available():
            return "the photographs and emoji are not on this machine (docs/compare.md, data)"
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = 1 + _ARM * len(run.arms)
        return [
            WorkUnit(self.key, f"{s}", cost, f"training and segmentation, seed {s}", {"seed": s}) for s in run.seeds
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = int(unit.params["seed"])
        model = self.fresh(run, seed)

        def get_batch(step: int) -> tuple[Tensor, Tensor]:
            return self._drawn(run, self.batch, "train", training=seed, step=step)

        def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            found: Tensor = model(pixel_values=batch[0], labels=batch[1]).loss
            return found

        state = fit(
            model, get_batch, loss, budget=self.steps,
            optimizers=[torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)],
            schedule=decay("cosine", warmup=0.1, floor=0.02), on_step=lambda _: run.advance(1 / self.steps),
        )  # fmt: skip
        model.eval()
        tail = state.losses[-max(1, len(state.losses) // 10) :]
        yield self.row("training_loss", run.baseline, sum(tail) / len(tail), "training", seed=seed)
        for start in range(0, self.samples, self.at_once):
            count = min(self.at_once, self.samples - start)
            images, labels = self._drawn(run, count, "test", part="test", seed=seed, start=start)
            for arm in run.arms:
                with self.under(model, arm):
                    said = self.segmented(model, arm, images).argmax(1)
                for i, value in enumerate(mean_iou(said, labels).tolist(), start):
                    yield self.row("iou", arm, value, f"{seed}.{i}", seed=seed)
                run.advance(_ARM * count / self.samples)

    def _drawn(self, run: RunContext, count: int, split: Any, **axes: Any) -> tuple[Tensor, Tensor]:
        """Images in -1..1 and the labels of their pixels, on the run's device."""
        generator = run.torch_rng(task=self.key, **axes)
        picture = draw_pictures(count, generator, grid=self.grid, size=self.cell, split=split)
        return picture.images.to(run.device), pixel_labels(picture, self.grid, self.cell).to(run.device)


def mean_iou(said: Tensor, labels: Tensor) -> Tensor:
    """Of each image the mean over the classes that are there: ``[N, H, W]`` of class numbers to ``[N]``."""
    classes = torch.arange(len(scenes.OBJECTS) + 1, device=labels.device)[:, None, None, None]
    mine, true = said == classes, labels == classes
    both, either, there = (x.sum((2, 3)) for x in (mine & true, mine | true, true))
    kept = there > 0
    return (torch.where(kept, both, 0) / either.clamp(min=1)).sum(0) / kept.sum(0)
