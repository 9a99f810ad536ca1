# SPDX-License-Identifier: Apache-2.0
"""Round keys after a rotation that spreads an outlying channel over all of them.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456; of that paper the cache. A
Hadamard matrix over the channels of a head, after rotary positions, leaves q k as it is and makes channels alike, so
that one scale for a token serves them all. This shows what such a cache loses; it holds every byte.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ._rounding import Rounding, rounded

__all__ = ["QuaRot"]


@dataclass(frozen=True, kw_only=True)
class QuaRot(Rounding):
    """A Hadamard rotation of keys before they are rounded by token."""

    def keys(self, k: Tensor) -> Tensor:
        turn = hadamard(k.shape[-1], k.device)
        return (rounded(k.float() @ turn, -1) @ turn.T).to(k.dtype)


def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthogonal Hadamard matrix ``[size, size]`` of Sylvester.

    Raises:
        UserError: ``size`` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise UserError(f"quarot: a head of {size} channels has no Sylvester rotation; they must be a power of two")
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)
