# SPDX-License-Identifier: Apache-2.0
"""Which of two objects a film shows first, asked of a vision-language model that is trained on such questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ...data.object_scenes import draw_films
from ...data.scenes import OBJECTS
from ...data.visual_questions import Questions, order
from ...experiment import Arm, Metric, Row
from ...models.joined_vlm import JoinedVLM
from ._answers import ANSWER_METRICS, AnswerTask, Split

__all__ = ["FrameOrder"]


@dataclass(frozen=True, kw_only=True)
class FrameOrder(AnswerTask):
    """Films of ``frames`` frames with one object each, and whether one object comes before another.

    Attributes:
        frames: of a film, at most eight.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        *ANSWER_METRICS,
        Metric("ordered", "pairs put into the right order", higher=True, kind="share", floor=0.5),
    )

    frames: int = 4
    grid: int = 2
    filler: int = 4

    def pictures(self, vlm: JoinedVLM, count: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
        films = draw_films(count, self.frames, generator, grid=self.grid, size=self.cell * vlm.patch)
        shown, where = films.objects.flatten()[:, None], films.cells.flatten()[:, None]
        cells = torch.full((len(shown), len(OBJECTS)), -1).scatter(1, shown, where)
        return films.images.flatten(0, 1), cells, self.grid, self.cell

    def questions(self, vlm: JoinedVLM, count: int, generator: Generator, filler: int, split: Split) -> Questions:
        return order(
            vlm.language, count, generator, grid=self.grid, size=self.cell * vlm.patch, patches=self.patches,
            frames=self.frames, asked=self.asked, filler=filler, split=split,
        )  # fmt: skip

    def judged(self, arm: Arm, seed: int, times: int, asked: Questions, yes: Tensor) -> Iterator[Row]:
        right = (yes == asked.truth).tolist()
        for i, (row, apart) in enumerate(zip(right, asked.cells.tolist(), strict=True)):
            for j, (found, frames) in enumerate(zip(row, apart, strict=True)):
                at = {"times": times, "apart": frames}
                yield self.row("ordered", arm, found, f"{i}.{j}", context=f"{i}", seed=seed, at=at)
