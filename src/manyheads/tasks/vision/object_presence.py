# SPDX-License-Identifier: Apache-2.0
"""Whether an object is in a picture, asked of a vision-language model: what it sees and makes up, by the part.

The model is trained on such questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from ...data.object_scenes import draw_pictures
from ...data.visual_questions import Questions, presence
from ...experiment import Arm, Metric, Row
from ...models.joined_vlm import JoinedVLM
from ._answers import ANSWER_METRICS, AnswerTask, Split

__all__ = ["ObjectPresence"]


@dataclass(frozen=True, kw_only=True)
class ObjectPresence(AnswerTask):
    """Pictures of up to eight objects in cells of a grid, an image and filler before ``asked`` questions.

    Half of all questions are about objects that are absent, whatever was asked before. The gap between rows is the
    difference of the shares seen in the upper and in the lower half of pictures, one figure for each training.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        *ANSWER_METRICS,
        Metric("hallucinated", "absent objects said to be there", kind="share", floor=0.5),
        Metric("seen", "objects said to be there that are", higher=True, kind="share", floor=0.5),
        Metric("half_gap", "distance of the shares seen in the upper and the lower half"),
    )

    def pictures(self, vlm: JoinedVLM, count: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
        drawn = draw_pictures(count, generator, grid=self.grid, size=self.cell * vlm.patch)
        return drawn.images, drawn.cells, self.grid, self.cell

    def questions(self, vlm: JoinedVLM, count: int, generator: Generator, filler: int, split: Split) -> Questions:
        return presence(
            vlm.language, count, generator, grid=self.grid, size=self.cell * vlm.patch, patches=self.patches,
            asked=self.asked, filler=filler, split=split,
        )  # fmt: skip

    def judged(self, arm: Arm, seed: int, times: int, asked: Questions, yes: Tensor) -> Iterator[Row]:
        halves: dict[str, list[bool]] = {"upper": [], "lower": []}
        each = zip(yes.tolist(), asked.truth.tolist(), asked.cells.tolist(), strict=True)
        for i, (said, truth, cells) in enumerate(each):
            for j, (answer, there, cell) in enumerate(zip(said, truth, cells, strict=True)):
                row = cell // self.grid
                at: dict[str, str | int] = {"times": times}
                if there:
                    half = "upper" if row < self.grid // 2 else "lower"
                    halves[half].append(answer)
                    at |= {"half": half, "row": row}
                name = "seen" if there else "hallucinated"
                yield self.row(name, arm, answer, f"{i}.{j}", context=f"{i}", seed=seed, at=at)
        upper, lower = (sum(found) / max(1, len(found)) for found in halves.values())
        yield self.row("half_gap", arm, abs(upper - lower), "all", seed=seed, at={"times": times})
