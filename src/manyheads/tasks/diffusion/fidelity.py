# SPDX-License-Identifier: Apache-2.0
"""How near an arm's images or videos are to those that the pipeline makes alone, from the same prompts and noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...experiment import Metric, Row, RunContext, WorkUnit
from ._image_task import ImageTask

__all__ = ["Fidelity", "psnr"]

_EQUAL = 100.0  # dB of images that do not differ: their PSNR is infinite


@dataclass(frozen=True, kw_only=True)
class Fidelity(ImageTask):
    """Peak signal-to-noise ratio to the baseline's image, and the largest difference of a pixel."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("psnr", "PSNR to the plain image, dB", "dB", higher=True),
        Metric("largest", "largest pixel difference"),
    )

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed, first, last = (unit.params[name] for name in ("seed", "first", "last"))
        plain = self.images(run, run.baseline, seed, first, last)
        for arm in run.arms:
            made = plain if arm is run.baseline else self.images(run, arm, seed, first, last)
            largest = (made - plain).abs().flatten(1).amax(1)
            yield from self.judged(arm, seed, {"psnr": psnr(made, plain), "largest": largest}, first)
            run.advance(unit.cost / len(run.arms))


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in 0..1, dB, float32 ``[N]``; 100 where they do not differ."""
    error = (images - others).double().square().flatten(1).mean(1)
    return torch.where(error > 0, -10 * error.clamp(min=1e-10).log10(), _EQUAL).float()
