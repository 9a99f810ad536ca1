# SPDX-License-Identifier: Apache-2.0
"""Models that pictures' classifiers are compared with, and blocks over patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...attention.positions import sinusoids

__all__ = ["InvertedBlock", "PatchModel", "ResidualBlock", "StagedCNN"]


class ResidualBlock(nn.Module):
    """ResNet's basic block (arXiv 1512.03385): two 3x3 convolutions, with ``hidden`` channels between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]``."""
        out: Tensor = (x + self.inner(x)).relu()
        return out


class InvertedBlock(nn.Module):
    """MobileNetV2's block (arXiv 1801.04381): widened to ``hidden``, a 3x3 convolution of each channel, narrowed."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]``."""
        out: Tensor = x + self.inner(x)
        return out


class StagedCNN(nn.Module):
    """Images ``[B, 3, H, W]`` -> logits ``[B, classes]``: four stages, between which channels double and sides halve.

    Args:
        block: of ``dim 2^i`` channels in stage i, and ``width 2^i / 2`` inside.
        patch: stride of the stem.
        dim: channels of the first stage.
        width: twice the channels inside the blocks of the first stage.
        layers: blocks of a stage.
        dropout: before the last layer.
        classes: that there are.
    """

    def __init__(
        self, block: type[ResidualBlock] | type[InvertedBlock], patch: int, dim: int, width: int, layers: int,
        dropout: float, classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(3, dim, 2 * patch - 1, patch, patch - 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
        ]  # fmt: skip
        for i in range(4):
            size = dim * 2**i
            if i:
                parts += [nn.Conv2d(size // 2, size, 3, 2, 1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
            parts += [block(size, max(1, width * 2**i // 2)) for _ in range(layers)]
        self.trunk = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * dim, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.trunk(images))
        return logits


class PatchModel(nn.Module):
    """Images -> patches row by row, blocks ``block(x [B, T, dim], mask [B, T]) -> [B, T, dim]``, their mean, logits.

    Positions are sinusoidal, half of the features for the row and half for the column.
    """

    def __init__(self, blocks: Sequence[nn.Module], patch: int, dim: int, classes: int) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Conv2d(3, dim, patch, patch), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.enter(images)
        rows, columns = (sinusoids(torch.arange(n, device=x.device), x.shape[1] // 2).to(x) for n in x.shape[2:])
        where = torch.cat((rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)), -1)
        x = x.flatten(2).mT + where.flatten(0, 1)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
