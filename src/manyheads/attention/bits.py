# SPDX-License-Identifier: Apache-2.0
"""Sign bits packed eight to a byte, and their Hamming distance."""

import torch
from torch import Tensor

__all__ = ["hamming", "pack_signs"]


def pack_signs(x: Tensor) -> Tensor:
    """``[..., b] -> uint8 [..., ceil(b / 8)]``: bit i is ``x[i] >= 0``; unused bits of the last byte are 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    packed: Tensor = (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return packed


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Number of differing bits, int32, over the last axis of two broadcastable packed tensors."""
    x = a ^ b  # count bits by halving: pairs, nibbles, byte
    x = (x & 0x55) + ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x & 0x0F) + (x >> 4)).sum(-1, dtype=torch.int32)
