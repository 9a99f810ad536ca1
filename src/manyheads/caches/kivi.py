# SPDX-License-Identifier: Apache-2.0
"""Round keys with a scale for each channel of a group of tokens, values with one for each token.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750. Outlying channels of keys
are the same in all tokens, so a scale for each channel, over ``group`` tokens in a row, keeps them from drowning the
others; what does not fill a group stays whole. Here with four bits and symmetric, as the other four-bit caches of this
library are (released: two bits, with an offset). This shows what such a cache loses; it holds every byte.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ._rounding import Rounding, rounded

__all__ = ["KIVI"]


@dataclass(frozen=True, kw_only=True)
class KIVI(Rounding):
    """Scales by channel for keys, by token for values.

    Attributes:
        group: tokens that share a channel's scale; with as many as a head has channels the scales of keys take the
            room that scales by token take.
    """

    group: int = field(default=32, metadata={"help": "tokens that share the scale of a channel"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise UserError(f"kivi: group counts tokens, 1 or more, not {self.group}")

    def keys(self, k: Tensor) -> Tensor:
        whole = k.shape[2] // self.group * self.group
        groups = rounded(k[:, :, :whole].unflatten(2, (-1, self.group)), -2) if whole else k[:, :, None, :0]
        return torch.cat([groups.flatten(2, 3), k[:, :, whole:]], 2)
