# SPDX-License-Identifier: Apache-2.0
"""How a denoiser is shown a source beside what it denoises, by weights that are trained with it.

Shapes: latents ``[B, C, *grid]``, tokens ``[B, N, dim]`` of the target and ``[B, M, dim]`` of the source, both as the
denoiser embeds them, with its positions where it adds some; tables of rotary positions ``[1, N, 1, head_dim]``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .strategy import Strategy

__all__ = ["Condition", "DenoiserConfig", "Rotary", "SourceCondition"]

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each for a pair of neighbouring channels twice


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


class Condition(nn.Module):
    """The weights of a condition, and what they do at the places of a denoiser where it acts; here nothing at all.

    Attributes:
        joined: source tokens stand behind those of the target in one sequence, from which they are cut at the end.
        clean: joined source tokens are told that they are free of noise; otherwise the timestep of the target.
        beside_text: it acts beside attention to the text.
    """

    joined: ClassVar[bool] = False
    beside_text: ClassVar[bool] = False
    clean: bool = False

    def embedded(self, target: Tensor, tokens: Tensor, latents: Tensor) -> Tensor:
        """What blocks read in place of ``target``, given tokens and latents of the source."""
        del tokens, latents
        return target

    def join(self, target: Tensor, source: Tensor) -> Tensor:
        """One sequence of two, along axis 1: of tokens, and of tables of positions."""
        raise NotImplementedError(f"{type(self).__name__} joins no sequences")

    def added(self, layer: int, hidden: Tensor, source: Tensor, rotary: Rotary | None) -> Tensor:
        """What is added to the output of the attention to text in a block, given what that attends with."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing in layer {layer}")


class SourceCondition(Strategy, ABC):
    """Shows a denoiser a source, in weights that are trained with it."""

    @abstractmethod
    def condition(self, config: DenoiserConfig) -> Condition:
        """New weights for a denoiser of that size; with them it begins as near to itself as this way allows."""
