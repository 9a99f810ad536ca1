# SPDX-License-Identifier: Apache-2.0
"""An edit of a scene that moves its object: is the rest kept, and does the object stand where the new caption says?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...experiment import Metric, Row, RunContext, WorkUnit
from ._image_task import ImageTask, drawn, judge_of

__all__ = ["KeptBackground"]


@dataclass(frozen=True, kw_only=True)
class KeptBackground(ImageTask):
    """Source and target start from the same noise and ask for the same object and backdrop, the object in two quarters.

    ``kept``: PSNR of the target to its source outside both quarters. ``place`` and ``object``: whether the judge sees
    them in the target as its caption says.
    """

    known_contents: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("kept", "PSNR of what is kept, dB", "dB", higher=True),
        Metric("place", "object where the caption says", higher=True, kind="share"),
        Metric("object", "object that the caption says", higher=True, kind="share"),
    )

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed, first, last = (unit.params[name] for name in ("seed", "first", "last"))
        source = drawn(run, self.samples, seed)[first:last]
        turn = torch.randint(1, 4, (self.samples,), generator=run.torch_rng(turn=seed))[first:last]
        target = source.clone()
        target[:, 1] = (source[:, 1] + turn) % 4
        places = torch.stack([source[:, 1], target[:, 1]], 1)
        for arm in run.arms:
            made = self.images(
                run, arm, seed, first, last, labels=torch.cat([source, target]),
                prepare=lambda noise: torch.cat([noise[: len(noise) // 2]] * 2),
            )  # fmt: skip
            before, after = made.chunk(2)
            seen = judge_of(run).see(after)
            found = {
                "kept": kept(before, after, places), "place": seen.right(target, "place"),
                "object": seen.right(target, "object"),
            }  # fmt: skip
            yield from self.judged(arm, seed, found, first)
            run.advance(unit.cost / len(run.arms))


def kept(source: Tensor, target: Tensor, places: Tensor) -> Tensor:
    """PSNR in dB of ``target [N, 3, H, W]`` against ``source`` outside the quarters ``places [N, 2]``: ``[N]``."""
    half = source.shape[-1] // 2
    outside = torch.ones(len(source), 1, *source.shape[-2:])
    for column in places.T:
        for i, place in enumerate(column.tolist()):
            row, at = place // 2 * half, place % 2 * half
            outside[i, :, row : row + half, at : at + half] = 0
    error = ((source - target).square() * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
    return -10 * error.clamp(min=1e-10).log10()
