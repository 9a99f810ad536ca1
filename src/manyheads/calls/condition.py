# SPDX-License-Identifier: Apache-2.0
"""The weights by which a denoiser is shown a source, and what they do at the places of a denoiser where they act.

Shapes: latents ``[B, C, *grid]``, tokens ``[B, N, dim]`` of the target and ``[B, M, dim]`` of the source, both as the
denoiser embeds them, with its positions where it adds some; tables of rotary positions ``[1, N, 1, head_dim]``.
"""

from typing import ClassVar

from torch import Tensor, nn

from ..attention.rope import Rotary

__all__ = ["Condition"]


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
