# SPDX-License-Identifier: Apache-2.0
"""What a page encoder of each arm costs by the number of words: time, bytes kept for backward, and products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...models.decoder import TokenModel
from ...models.page import PageConfig, PageEncoder
from .classifier_cost import ClassifierCost

__all__ = ["PageCost"]

_WORDS, _SIDE = 8, 1000  # words of a line


@dataclass(frozen=True, kw_only=True)
class PageCost(ClassifierCost):
    """As ``classifier_cost``, of encoders that are given words and their boxes: lines of eight words."""

    kind: ClassVar[type[TokenModel]] = PageEncoder

    @property
    def config(self) -> PageConfig:
        return PageConfig(self.vocab, self.dim, self.layers, self.heads, length=self.length, labels=2)

    def read(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        wide, tall = _SIDE // _WORDS, max(1, _SIDE // -(-ids.shape[1] // _WORDS))
        left, top = at % _WORDS * wide, (at // _WORDS * tall).clamp(max=_SIDE - tall)
        boxes = torch.stack([left, top, left + wide // 2, top + tall], 1)
        return torch.cat([ids[..., None], boxes.expand(*ids.shape, 4)], 2)
