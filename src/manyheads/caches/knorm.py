# SPDX-License-Identifier: Apache-2.0
"""Keep the keys of least norm.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430. In many
decoders a key of small L2 norm points against the mean of the other keys and draws attention from most queries, as the
first token does: score_j = -|k_j|, per head. Neither queries nor attention weights are needed, and rotary positions do
not change a norm.

Differs from the paper: it leaves the first two layers, where the correlation is weak, as they are; here every selected
layer is compressed, and ``layers=2-31`` spares them. Norms are taken in float32: rounded to bfloat16 most of them tie.
A model that normalises its keys per head (QK norm) gives them norms that say little, which is warned of.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import reference
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["Knorm"]


@dataclass(frozen=True, kw_only=True)
class Knorm(EvictionStrategy):
    """Keep the keys of least L2 norm."""

    def score(self, view: CacheView) -> Tensor:
        if view.site.keys_normed:
            warnings.warn(
                "knorm: this model normalises its keys, so their norms say little and what stays is nearly random; "
                "choose keydiff or snapkv",
                stacklevel=2,
            )
        norms: Tensor = torch.linalg.vector_norm(reference.widened(view.k), dim=-1)
        return -norms
