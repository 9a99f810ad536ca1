# SPDX-License-Identifier: Apache-2.0
"""The kinds of strategies that have weights of their own, trained together with those of a denoiser."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from .strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from .calls.condition import Condition
    from .calls.stage_blocks import StageBlocks

__all__ = [
    "AdaptedSite",
    "AttentionAdaptor",
    "DenoiserConfig",
    "DenoiserWeights",
    "FrozenAttention",
    "InsertedBlocks",
    "SourceCondition",
    "StageConfig",
]


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


@dataclass(frozen=True, slots=True)
class AdaptedSite:
    """Size of an attention that is adapted.

    Attributes:
        dim: channels of what asks, and of the output.
        context: channels of what is looked at.
        heads, head_dim: of the attention.
    """

    dim: int
    context: int
    heads: int
    head_dim: int


class FrozenAttention(Protocol):
    """The projections of an attention as it was trained; none of them splits heads.

    Attributes:
        heads: that there are.
        scale: of the logits.
    """

    heads: int
    scale: float

    def q(self, x: "Tensor") -> "Tensor": ...
    def k(self, context: "Tensor") -> "Tensor": ...
    def v(self, context: "Tensor") -> "Tensor": ...
    def out(self, y: "Tensor") -> "Tensor": ...


class DenoiserWeights(Strategy, ABC):
    """Has weights that are trained with a denoiser; one of the kinds that follow.

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


class AttentionAdaptor(DenoiserWeights):
    """Adapts the cross-attention of a frozen denoiser, by few weights that are trained and kept beside it."""

    recipe: ClassVar[str] = "new_object"

    @abstractmethod
    def branches(self, sites: "Mapping[str, AdaptedSite]") -> "Mapping[str, nn.Module]":
        """By name, modules ``branch(frozen, x [B, T, dim], context [B, S, context]) -> [B, T, dim]``.

        They stand in for the attention that ``frozen`` is, and begin as that.
        """
