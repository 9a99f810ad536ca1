# SPDX-License-Identifier: Apache-2.0
"""The vision-language models that tasks train, always from the same first weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...data import scenes
from ...data.visual_questions import WORDS
from ...experiment import RunContext, Task, seeding
from ...models import joined_vlm
from ...models.joined_vlm import JoinedVLM

__all__ = ["VLMTask"]


@dataclass(frozen=True, kw_only=True)
class VLMTask(Task):
    """Base of tasks that train a model that reads images.

    Attributes:
        model: ``small``, from scratch, or ``joined``, of two published models: see :mod:`manyheads.models.joined_vlm`.
        dim, layers, heads, theta: of the decoder of a small one.
        patch: pixels of a patch's side in a small model.
    """

    subject: ClassVar[str] = "trainable"
    words: ClassVar[Sequence[str]] = WORDS  # that a small model knows

    model: Literal["small", "joined"] = "small"
    dim: int = 64
    layers: int = 2
    heads: int = 4
    theta: float = 100.0
    patch: int = 8

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
            if self.model == "small":
                return joined_vlm.small(
                    patches=self.patches, size=self.patch, dim=self.dim, layers=self.layers, heads=self.heads,
                    theta=self.theta, words=self.words, device=run.device,
                )  # fmt: skip
            vlm: JoinedVLM
            vlm, first = run.kept("joined", lambda: self._joined(run))
            with torch.no_grad():
                for name, parameter in vlm.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(first[name])
                joined_vlm.new_projector(vlm)
            return vlm

    def _joined(self, run: RunContext) -> tuple[JoinedVLM, dict[str, Tensor]]:
        vlm = joined_vlm.join(attention=True, device=run.device)
        return vlm, {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}
