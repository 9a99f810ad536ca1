# SPDX-License-Identifier: Apache-2.0
"""Detectors of fake speech: a view of the recording, a back-end, and one score, or the mean score of two detectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._cepstra import COEFFICIENTS
from ._verification import AttentiveStatistics
from ._whisper import WIDTH

__all__ = ["Detector", "OneView", "ScoreAverage"]


class OneView(nn.Module):
    """One of two views, normalised and projected: ``s [B, T, 384]``, ``c [B, F, 60]`` -> ``[B, T or F, dim]``."""

    def __init__(self, features: int, dim: int, spectral: bool) -> None:
        super().__init__()
        self.spectral, self.project = spectral, nn.Sequential(nn.LayerNorm(features), nn.Linear(features, dim))

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        found: Tensor = self.project(c if self.spectral else s)
        return found


class Convolution(nn.Module):
    """What is added to frames ``[B, T, D]``: a convolution over five of them to ``width`` features, and back."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Conv1d(dim, width, 5, padding=2), nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.dropout(nn.functional.gelu(self.up(self.norm(x).mT).mT)))
        return found


class Detector(nn.Module):
    """Views of a recording ``s [B, T, 384]`` and ``c [B, F, 60]`` -> logits ``[B, 1]`` of its being fake.

    Attributes:
        sizes: features of the two views.
        fuse: ``(s, c) -> [B, T, dim]``; a paper on fusion puts its own here.
    """

    def __init__(self, task: Any, width: int, spectral: bool = False) -> None:
        super().__init__()
        dim = task.dim
        self.sizes = (WIDTH, 3 * COEFFICIENTS)
        self.fuse: nn.Module = OneView(self.sizes[spectral], dim, spectral)
        self.blocks = nn.ModuleList(Convolution(dim, width, task.dropout) for _ in range(task.layers))
        self.pool, self.head = (
            AttentiveStatistics(dim, bias=True),
            nn.Sequential(nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 1)),
        )

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        x = self.fuse(s, c)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.head(self.pool(x))
        return found


class ScoreAverage(nn.Module):
    """Two detectors, each with a view of its own and each trained for itself: logits ``[B, 2]``."""

    def __init__(self, task: Any, width: int) -> None:
        super().__init__()
        self.detectors = nn.ModuleList(Detector(task, width, spectral) for spectral in (False, True))

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        return torch.cat([detector(s, c) for detector in self.detectors], -1)
