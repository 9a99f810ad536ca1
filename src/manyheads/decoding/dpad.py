# SPDX-License-Identifier: Apache-2.0
"""Suffix dropout: of the masks behind a block that is decoded, a masked diffusion model reads few, fewer far away.

*DPad: Efficient Diffusion Language Models with Suffix Dropout*, arXiv 2508.14148. The masks behind a block are all one
token, so that they can tell little but how far the text may go on; the paper calls them a scratchpad, of which the near
part is used. Reading a tenth of them costs a tenth. They are dropped before the model, which needs no training:

- a window: none of the masks at a distance of ``window`` or more from the end of the block is read;
- a decay: of those within, that at distance j is kept with probability min(1, scale * phi(k_sigma * j / (window - 1))),
  phi the standard normal density; drawn once for each block, the same in all of its steps;
- positions: what is kept stays where it was, so that the model sees gaps, not a shorter text;
- early termination: no further block after one with an end token (``stop``, of every decoder of blocks here).

The released code is followed. As it stands a step costs P + b + about 64 tokens for the defaults, instead of all that
are left. ``decay=uniform`` keeps as many on average, anywhere in the window; ``none`` the window whole; ``window=0``
no suffix. Inferred: near the end, where fewer masks than the window are left, ``uniform`` keeps as many of them as the
Gaussian would on average.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ._blocks import BlockDecoding

__all__ = ["DPad", "keep_probability"]


def keep_probability(window: int, k_sigma: float = 4.0, scale: float = 2.0) -> Tensor:
    """Probability that the mask at each distance is kept, float64 ``[window]``: a Gaussian's half, cut at 1."""
    x = torch.linspace(0, k_sigma, window, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return (scale * density).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True)
class DPad(BlockDecoding):
    """Fill blocks with a suffix that thins out."""

    window: int = field(default=256, metadata={"help": "masks behind a block that may be read"})
    k_sigma: float = field(default=4.0, metadata={"help": "standard deviations that the window is wide"})
    scale: float = field(default=2.0, metadata={"help": "of the density; above, more are kept"})
    decay: Literal["gaussian", "uniform", "none"] = field(
        default="gaussian", metadata={"help": "how those within are thinned: by distance, alike, or not"}
    )

    def __post_init__(self) -> None:
        BlockDecoding.__post_init__(self)
        if self.window < 0 or self.k_sigma < 0 or self.scale < 0:
            raise UserError(f"{self.spec}: window, k_sigma and scale are not negative")

    def kept(self, behind: int, draws: torch.Generator) -> Tensor:
        within = min(behind, self.window)
        if self.decay == "none" or not within:
            return torch.arange(within)
        chance = keep_probability(self.window, self.k_sigma, self.scale)[:within]
        if self.decay == "uniform":
            chance = chance.mean().expand(within)
        return (torch.rand(within, dtype=torch.float64, generator=draws) < chance).nonzero()[:, 0]
