# SPDX-License-Identifier: Apache-2.0
"""ViT and ViViT as they are in transformers, of any width, and pictures and films of known classes for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor

from ...data import photograph_classes, scenes
from ...errors import UserError
from ...experiment import Arm, RunContext, Task, seeding
from ...recipes.tokenlearner import drawn
from ...reducing import Reducer

__all__ = ["PictureClassifierTask"]


@dataclass(frozen=True, kw_only=True)
class PictureClassifierTask(Task):
    """Base of tasks on classifiers with fewer tokens. An arm with the option ``layers`` is a model of so many.

    Attributes:
        of: ``photographs`` of ten classes, 8 x 8 patches; or ``films`` of an object that moves, of which the object
            and its direction are a class, 32 in all: 4 pairs of frames of 4 x 4 patches.
        dim, layers, heads: of the model; feed-forward parts are twice as wide.
    """

    subject: ClassVar[str] = "trainable"

    of: Literal["photographs", "films"] = "photographs"
    dim: int = 64
    layers: int = 6
    heads: int = 4

    @property
    def classes(self) -> int:
        """Classes that there are."""
        return 10 if self.of == "photographs" else len(scenes.OBJECTS) * len(scenes.DIRECTIONS)

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not (photograph_classes.available() if self.of == "photographs" else scenes.available()):
            return "the photographs and emoji are not on this machine (docs/compare.md, data)"
        return None

    def guard(self, run: RunContext) -> None:
        """Refuse arms that do not reduce tokens."""
        for arm in run.arms:
            if len(arm.strategies) > 1 or not all(isinstance(s, Reducer) for s in arm.strategies):
                raise UserError(f"{self.name} compares ways to have fewer tokens, and {arm.spec} is no single one")

    def reducer(self, arm: Arm) -> Reducer | None:
        """The arm's way to have fewer tokens."""
        return arm.strategies[0] if arm.strategies else None  # type: ignore[return-value]

    def fresh(self, run: RunContext, arm: Arm, seed: int) -> Any:
        """A model with its first weights on the run's device; arms of one size share them."""
        shape: dict[str, Any] = {
            "hidden_size": self.dim, "num_hidden_layers": int(arm.options.get("layers", self.layers)),
            "num_attention_heads": self.heads, "intermediate_size": 2 * self.dim, "num_labels": self.classes,
        }  # fmt: skip
        model: Any
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            if self.of == "photographs":
                config = transformers.ViTConfig(image_size=32, patch_size=4, **shape)
                model = transformers.ViTForImageClassification(config)
            else:
                films: dict[str, Any] = {
                    "image_size": scenes.WINDOW,
                    "num_frames": scenes.FRAMES,
                    "tubelet_size": [2, 4, 4],
                }
                model = transformers.VivitForVideoClassification(transformers.VivitConfig(**films, **shape))
        return model.to(run.device).eval()

    def training_batch(self, run: RunContext, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Pixels in -1..1 and classes, on the run's device, alike for all arms."""
        generator = run.torch_rng(task=self.name, training=seed, step=step)
        pixels, labels = drawn(count, generator) if self.of == "photographs" else _films(count, generator, "train")
        return pixels.to(run.device), labels.to(run.device)

    def test_pixels(self, run: RunContext, count: int) -> tuple[Tensor, Tensor]:
        """``count`` pictures or films that no training saw, the same for all arms and seeds; on the CPU."""
        generator = run.torch_rng(task=self.name, part="test")
        if self.of == "films":
            return _films(count, generator, "test")
        images, labels = photograph_classes.photographs("test")
        rows = torch.randperm(len(images), generator=generator)[:count]
        return images[rows].float() / 127.5 - 1, labels[rows]


def _films(count: int, generator: torch.Generator, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Films ``[N, F, 3, 16, 16]`` in -1..1, and their object and direction as one number."""
    sample = scenes.draw("moving", count, generator, split)
    return sample.images.transpose(1, 2), sample.labels[:, 0] * len(scenes.DIRECTIONS) + sample.labels[:, 1]
