# SPDX-License-Identifier: Apache-2.0
"""Blocks that stand behind those of a denoiser of videos: what they read and what they give."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["RegionSeen", "StageBlocks", "StageOutput"]


class RegionSeen(NamedTuple):
    """What a block predicted of one region on the way, for a loss; None where it predicts none.

    Attributes:
        mask: logits of the region's mask, ``[B, T, H, W]``.
        heat: maps of its keypoints, ``[B, T, K, H, W]``.
    """

    mask: Tensor | None
    heat: Tensor | None


class StageOutput(NamedTuple):
    """What an inserted block gives.

    Attributes:
        features: as it was given, ``[B, T, H, W, D]``.
        seen: by the region's name.
    """

    features: Tensor
    seen: dict[str, RegionSeen]


class StageBlocks(nn.Module, ABC):
    """All blocks that are inserted into one denoiser."""

    @abstractmethod
    def described(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """What the blocks of one forward share: tokens ``[B, L, d]`` of each region, of crops ``[B, K, C, S, S]``."""

    @abstractmethod
    def stage(self, index: int, features: Tensor, described: Sequence[Tensor]) -> StageOutput:
        """What becomes of the features ``[B, T, H, W, D]`` that the denoiser's block of that number gave."""
