# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that show a denoiser a source beside what it denoises, by weights that are trained with it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .strategy import Strategy

if TYPE_CHECKING:
    from .calls.condition import Condition

__all__ = ["DenoiserConfig", "SourceCondition"]


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


class SourceCondition(Strategy, ABC):
    """Shows a denoiser a source, in weights that are trained with it.

    Attributes:
        recipe: by which one is trained, of :mod:`manyheads.recipes`.
    """

    recipe: ClassVar[str] = "native3d_edit"

    @abstractmethod
    def condition(self, config: DenoiserConfig) -> "Condition":
        """New weights for a denoiser of that size; with them it begins as near to itself as this way allows."""
