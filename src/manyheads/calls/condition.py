# SPDX-License-Identifier: Apache-2.0
"""The weights by which a denoiser is shown a source, and what they do at the places of a denoiser where they act.

Shapes: latents ``[B, C, *grid]``, tokens ``[B, N, dim]`` of the target and ``[B, M, dim]`` of the source, both as the
denoiser embeds them, with its positions where it adds some; tables of rotary positions ``[1, N, 1, head_dim]``.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.rope import Rotary

__all__ = ["Condition", "Stream", "ViewCondition"]


class Condition(nn.Module):
    """The weights of a condition, and what they do at the places of a denoiser where it acts; here nothing at all.

    Attributes:
        joined: source tokens stand behind those of the target in one sequence, from which they are cut at the end.
        goes_on: positions of joined source tokens go on behind those of the target; otherwise they are the same.
        clean: joined source tokens are told that they are free of noise; otherwise the timestep of the target.
        beside_text: it acts beside attention to the text.
    """

    joined: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False
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


class Stream(NamedTuple):
    """Tokens of their own beside those of a denoiser.

    Attributes:
        tokens: ``[B, M, dim]``.
        rotary: tables ``[1, M, 1, head_dim]``.
    """

    tokens: Tensor
    rotary: Rotary


class ViewCondition(Condition):
    """One that is also told the cameras of the target, and shown a rendering from there; joined, positions go on.

    Attributes:
        rendered: it is shown a rendering where one is given.
    """

    joined: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True
    rendered: bool = False

    def embedded(self, target: Tensor, tokens: Tensor, latents: Tensor) -> Tensor:
        return torch.cat([target, tokens], 1)

    def poses(self, cameras: Tensor) -> Tensor:
        """What becomes of cameras ``[B, F, 3, 4]``, once for all layers."""
        return cameras

    def placed(self, rotary: Rotary, grid: tuple[int, ...], small: tuple[int, ...]) -> Rotary:
        """Positions of a rendering of ``small`` tokens along each axis, of those of a target of ``grid``."""
        raise NotImplementedError(f"{type(self).__name__} is shown no rendering of {small}")

    def read(self, layer: int, hidden: Tensor, poses: Tensor) -> Tensor:
        """What self-attention reads in place of ``hidden [B, N + M, dim]`` of target and source."""
        return hidden

    def viewed(self, layer: int, hidden: Stream, poses: Tensor, render: Stream | None) -> Tensor | None:
        """What is added to the output of the attention to text at the target's tokens ``hidden``; None for nothing.

        Args:
            layer: of the block.
            hidden: of the target, as attention to text reads it.
            poses: of :meth:`poses`.
            render: what self-attention of this block reads where the rendering passes through it.
        """
        return None
