# SPDX-License-Identifier: Apache-2.0
"""Keep tokens at random: the control that every eviction strategy has to beat.

The draw depends on seed, layer, head and position alone, so a row of a padded batch keeps the same tokens as the row
by itself, and chunked prefill the same as one shot.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["Random"]


def _mix(x: Tensor) -> Tensor:
    """Scramble int64, modulo 2^64: the finaliser of SplitMix64 with a shift of 30 in its second round too, not 27.

    Stored results were drawn with it.
    """
    for multiplier in (-4658895280553007687, -7723592293110705685):
        x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True, kw_only=True)
class Random(EvictionStrategy):
    """Keep tokens drawn uniformly, each head its own.

    Attributes:
        seed: of the draw.
    """

    seed: int = field(default=0, metadata={"help": "seed of the draw"})

    def score(self, view: CacheView) -> Tensor:
        heads = torch.arange(view.positions.shape[1], device=view.k.device)[:, None]
        stream = _mix(heads + 1009 * (view.site.layer or 0) + 1_000_003 * self.seed)
        draw = _mix(_mix(view.positions) ^ stream) & ((1 << 24) - 1)
        return draw.to(torch.float32).expand(view.positions.shape)
