# SPDX-License-Identifier: Apache-2.0
"""The kinds of strategies that have weights of their own, trained together with those of a denoiser."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .calls.condition import Condition
    from .calls.stage_blocks import StageBlocks

__all__ = ["DenoiserConfig", "DenoiserWeights", "InsertedBlocks", "SourceCondition", "StageConfig"]


@dataclass(frozen=True, slots=True)
class DenoiserConfig:
    """Size of a denoiser that is conditioned.

    Attributes:
        dim, heads, layers: of its blocks.
        channels: of its latents.
        patch: side of a token along each axis of the grid.
    """

    dim: int
    heads: int
    layers: int
    channels: int
    patch: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Size of the features that a block of a denoiser gives.

    Attributes:
        dim: channels.
        heads: of attention over them.
    """

    dim: int
    heads: int


class DenoiserWeights(Strategy, ABC):
    """Has weights that are trained with a denoiser; one of the two kinds that follow.

    Attributes:
        recipe: by which one is trained, of :mod:`manyheads.recipes`.
    """

    recipe: ClassVar[str] = ""


class SourceCondition(DenoiserWeights):
    """Shows a denoiser a source, in weights that are trained with it."""

    recipe: ClassVar[str] = "native3d_edit"

    @abstractmethod
    def condition(self, config: DenoiserConfig) -> "Condition":
        """New weights for a denoiser of that size; with them it begins as near to itself as this way allows."""


class InsertedBlocks(DenoiserWeights):
    """Puts blocks of its own behind those of a denoiser of videos, in weights that are trained with it."""

    recipe: ClassVar[str] = "cyberhost"

    @abstractmethod
    def blocks(self, stages: "Sequence[StageConfig]") -> "StageBlocks":
        """New weights for blocks of those sizes; with them the denoiser begins as it was."""
