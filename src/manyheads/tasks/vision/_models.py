# SPDX-License-Identifier: Apache-2.0
"""The vision-language models that tasks train, always from the same first weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from ...data import scenes
from ...data.visual_questions import WORDS
from ...errors import UserError
from ...experiment import RunContext, Task, seeding
from ...models import joined_vlm
from ...models.image_pool import image_features
from ...models.joined_vlm import JoinedVLM
from ...recipes.joined_vlm import align

__all__ = ["VLMTask"]

_ALIGNED = 256  # pictures by which a projector is aligned


@dataclass(frozen=True, kw_only=True)
class VLMTask(Task):
    """Base of tasks that train a model that reads images.

    Attributes:
        model: ``small``, from scratch, ``towered``, the same on a published tower that is not trained, or ``joined``,
            of two published models: see :mod:`manyheads.models.joined_vlm`.
        dim, layers, heads, theta: of the decoder of a small one.
        patch: pixels of a patch's side in a small model.
        tower, text: of a joined one, the tower also of a towered one.
        pool: texts of a training that are drawn once, and whose images a joined model's tower reads once; 0 for new
            ones in every step, which is the only way where a tower is trained.
        align: steps in which a joined model's projector first learns the words of what patches show, see
            :func:`manyheads.recipes.joined_vlm.align`; all arms of a seed begin with what it learned. 0 for none.
    """

    subject: ClassVar[str] = "trainable"
    words: ClassVar[Sequence[str]] = WORDS  # that a small model knows

    model: Literal["small", "towered", "joined"] = "small"
    dim: int = 64
    layers: int = 2
    heads: int = 4
    theta: float = 100.0
    patch: int = 8
    tower: str = joined_vlm.TOWER
    text: str = joined_vlm.TEXT
    pool: int = 0
    align: int = 0

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not scenes.available():
            return "the photographs and emoji are not on this machine (docs/compare.md, data)"
        return None

    @property
    @abstractmethod
    def patches(self) -> int:
        """Tokens of an image's side."""

    def fresh(self, run: RunContext, seed: int) -> JoinedVLM:
        """A model with its first weights, on the run's device; no global generator is moved on."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            if self.model != "joined":
                return joined_vlm.small(
                    patches=self.patches, size=self.patch, dim=self.dim, layers=self.layers, heads=self.heads,
                    theta=self.theta, words=self.words, tower=self.tower if self.model == "towered" else "",
                    device=run.device,
                )  # fmt: skip
            vlm: JoinedVLM
            vlm, first = run.kept("joined", lambda: self._joined(run))
            with torch.no_grad():
                for name, parameter in vlm.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(first[name])
                joined_vlm.new_projector(vlm)
            if self.align:
                connects = vlm.model.model.multi_modal_projector
                connects.load_state_dict(
                    run.kept_last("aligned", (self, seed), lambda: self._aligned(run, vlm, seed))
                )  # fmt: skip
            return vlm

    def pictures(self, vlm: JoinedVLM, count: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
        """Pictures of the training, cells of the objects in them ``[N, 8]``, cells of a side and patches of one."""
        raise UserError(f"pictures of {self.name} do not tell what each patch shows: leave align away")

    def _aligned(self, run: RunContext, vlm: JoinedVLM, seed: int) -> dict[str, Tensor]:
        """A projector that knows the words of patches."""
        generator = run.torch_rng(task=self.key, training=seed, part="alignment")
        images, cells, grid, cell = self.pictures(vlm, _ALIGNED, generator)
        features = image_features(vlm, vlm.pixels(images))
        align(vlm, features, cells, grid=grid, cell=cell, steps=self.align, seed=seed)
        return {name: x.clone() for name, x in vlm.model.model.multi_modal_projector.state_dict().items()}

    def _joined(self, run: RunContext) -> tuple[JoinedVLM, dict[str, Tensor]]:
        vlm = joined_vlm.join(self.tower, self.text, attention=True, device=run.device)
        return vlm, {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}
