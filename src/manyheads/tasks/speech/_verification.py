# SPDX-License-Identifier: Apache-2.0
"""Encoders of a whole recording with their poolings, and how alike two recordings are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ._encoder import SpeechEncoder

__all__ = [
    "AttentiveStatistics", "Classified", "CosineClassifier", "Match", "MeanPool", "SpeakerEncoder",
]  # fmt: skip

_SCALE = 10.0  # of cosines; with some hundred classes a class can reach a probability of 0.99


class MeanPool(nn.Module):
    """The mean over frames ``[B, T, dim]`` where speech is, ``[B, dim]``."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, dim]``."""
        there = mask[..., None].to(x.dtype)
        mean: Tensor = (x * there).sum(1) / there.sum(1)
        return mean


class AttentiveStatistics(nn.Module):
    """Mean and deviation over frames, weighted by additive attention (Okabe et al., arXiv 1803.10963)."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, T, dim]`` -> ``[B, 2 dim]``; all frames are there where no mask is given."""
        scores = self.score(x)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], float("-inf"))
        weights = scores.softmax(1)
        mean = (weights * x).sum(1)
        variance = (weights * (x - mean[:, None]).square()).sum(1)
        return torch.cat((mean, variance.clamp(min=1e-6).sqrt()), -1)


class SpeakerEncoder(SpeechEncoder):
    """Frames ``[B, T, 40]`` and mask ``[B, T]`` -> states ``[B, n, dim]``, whose mean is the embedding."""

    def __init__(
        self, blocks: Sequence[nn.Module], dim: int, dropout: float, pool: nn.Module, head: nn.Module | None = None
    ) -> None:
        super().__init__(blocks, dim, 1, dropout, positions=True)
        self.pool, self.head = pool, head or nn.Identity()  # type: ignore[assignment]

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """States; n is 1 here."""
        pooled: Tensor = self.head(self.pool(*self.encode(frames, mask)))
        return pooled[:, None]


class CosineClassifier(nn.Module):
    """Scaled cosines with a vector of each class (NormFace, arXiv 1704.06369): pairs are judged by cosines too."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``[B, dim]``."""
        return _SCALE * linear(normalize(x, dim=-1), normalize(self.weight, dim=-1))


class Classified(nn.Module):
    """An encoder and a layer to the classes that it is trained by."""

    def __init__(self, model: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.model, self.head = model, CosineClassifier(dim, classes)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of the first state."""
        logits: Tensor = self.head(self.model(frames, mask)[:, 0])
        return logits


@dataclass(frozen=True)
class Match:
    """How alike two recordings are.

    Attributes:
        cosine: of their embeddings; it is compared with that of other pairs, no threshold is built in.
    """

    cosine: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.3f}"
