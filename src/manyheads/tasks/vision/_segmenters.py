# SPDX-License-Identifier: Apache-2.0
"""SegFormer as it is in transformers, of any width, and what it says of images under an arm."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn.functional import interpolate

from ...data.scenes import OBJECTS
from ...errors import UserError
from ...experiment import Arm, RunContext, Task, seeding
from ...integrations import use
from ...reducing import Reducer

__all__ = ["SegmenterTask"]


@dataclass(frozen=True, kw_only=True)
class SegmenterTask(Task):
    """Base of tasks on a SegFormer. An arm with the option ``downsampled`` is the plain model on smaller images.

    Attributes:
        width: channels of the first stage; the others have 2, 5 and 8 times as many. MiT-B0 has 32.
        depth: layers of every stage; 2 in MiT-B0.
    """

    subject: ClassVar[str] = "trainable"

    width: int = 32
    depth: int = 2

    def fresh(self, run: RunContext, seed: int) -> Any:
        """A model with its first weights on the run's device; no global generator is moved on."""
        config = transformers.SegformerConfig(
            hidden_sizes=[self.width * times for times in (1, 2, 5, 8)], depths=[self.depth] * 4,
            decoder_hidden_size=8 * self.width, drop_path_rate=0.0,
        )  # fmt: skip
        config.num_labels = len(OBJECTS) + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            model: Any = transformers.SegformerForSemanticSegmentation(config)
        return model.to(run.device).eval()

    def guard(self, run: RunContext) -> None:
        """Refuse arms that do not reduce tokens."""
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, Reducer)]:
                raise UserError(f"{self.name} compares ways to have fewer tokens, and {wrong[0]} is none")

    @torch.no_grad()
    def segmented(self, model: Any, arm: Arm, images: Tensor) -> Tensor:
        """Logits ``[N, classes, H, W]`` of ``images [N, 3, H, W]``; the arm's strategies are in use."""
        part = float(arm.options.get("downsampled", 1.0))
        given = images if part == 1.0 else interpolate(images, scale_factor=part, mode="area")
        return interpolate(model(pixel_values=given).logits, size=images.shape[2:], mode="bilinear")

    def under(self, model: Any, arm: Arm) -> AbstractContextManager[Any]:
        """The model with the arm's strategies in use."""
        return use(model, *arm.strategies) if arm.strategies else nullcontext()
