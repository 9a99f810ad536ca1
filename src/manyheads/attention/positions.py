# SPDX-License-Identifier: Apache-2.0
"""Positions as softmax attention is told of them: sinusoids, rotary tables, ALiBi's slopes, T5's buckets.

- Rotary positions: Su et al., RoFormer, arXiv 2104.09864; half-split layout as in :mod:`manyheads.attention.rope`.
- Dynamic NTK scaling: the base grows with the length L past the trained one, L_0:
  ``base * (factor * L / L_0 - (factor - 1)) ** (d / (d - 2))`` (as transformers' ``dynamic`` rope type).
- ALiBi: Press et al., arXiv 2108.12409.
- T5's relative buckets: Raffel et al., arXiv 1910.10683.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rope import Rotary

__all__ = [
    "alibi_bias", "alibi_slopes", "dynamic_ntk", "interleaved_sinusoids", "positions_of", "rope_tables",
    "rotate_per_head", "sinusoids", "split_heads", "t5_buckets",
]  # fmt: skip


def positions_of(
    batch: int, length: int, device: torch.device, mask: Tensor | None, seen: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Position of each token in its sequence ``[B, T]``, -1 for padding; ``seen [B]`` tokens came before."""
    if cu_seqlens is not None:
        columns = torch.arange(length, device=device)
        which = torch.searchsorted(cu_seqlens, columns, right=True) - 1
        at = columns - cu_seqlens[which]
        return (at if seen is None else at + seen[which])[None]
    first = torch.zeros(batch, dtype=torch.long, device=device) if seen is None else seen
    counted = torch.arange(length, device=device).expand(batch, -1) if mask is None else mask.long().cumsum(1) - 1
    at = first[:, None] + counted
    return at if mask is None else at.masked_fill(~mask, -1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, T, H * d] -> [B, H, T, d]``."""
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return heads.transpose(1, 2)


def rope_tables(
    positions: Tensor, dim: int, theta: float | Tensor = 10_000.0, dtype: torch.dtype = torch.float32
) -> Rotary:
    """Cosines and sines, each ``[B, T, dim]``, of ``positions [B, T]``; ``theta`` a number or ``[B]``."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    if isinstance(theta, Tensor):
        theta = theta.to(positions.device, torch.float64).reshape(-1, 1)
    angles = positions.double()[..., None] * (theta**-exponents).reshape(-1, 1, dim // 2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_per_head(x: Tensor, positions: Tensor, theta: float, factor: Tensor) -> Tensor:
    """``x [B, H, T, d]`` at ``positions [B, T]`` with a factor on every frequency, ``[1, H, 1, d / 2]``."""
    planes = x.shape[-1] // 2
    base = theta ** (-torch.arange(planes, device=x.device, dtype=torch.float32) / planes)
    angles = positions.float()[:, None, :, None] * (base * factor)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def dynamic_ntk(theta: float, dim: int, length: Tensor | int, trained: int, factor: float) -> Tensor:
    """Base of the rotation for sequences of ``length`` tokens; ``theta`` itself up to ``trained`` tokens."""
    ratio = torch.as_tensor(length, dtype=torch.float64) / trained
    grown = theta * (factor * ratio - (factor - 1)).clamp(min=1.0) ** (dim / (dim - 2))
    return torch.where(ratio > 1, grown, torch.full_like(grown, theta))


def alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """``2^(-8 h / H)`` for h = 1..H, float32 ``[H]``."""
    return 2.0 ** (-8.0 / num_heads * torch.arange(1, num_heads + 1, device=device))


def alibi_bias(queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """``-slope * (t - s)`` float32 ``[B, H, T, S]`` of positions ``[B, T]`` and ``[B, S]``."""
    apart = (queries[:, :, None] - keys[:, None]).float()
    return -alibi_slopes(num_heads, queries.device)[None, :, None, None] * apart[:, None]


def t5_buckets(apart: Tensor, num_buckets: int = 32, furthest: int = 128, causal: bool = True) -> Tensor:
    """Bucket 0..num_buckets - 1 of ``apart = key position - query position``: exact when near, logarithmic beyond.

    A causal model has one side and half of its buckets are exact; a bidirectional one halves them between the sides.
    """
    side = torch.zeros_like(apart)
    if causal:
        apart = (-apart).clamp(min=0)
    else:
        num_buckets //= 2
        side = (apart > 0).long() * num_buckets
        apart = apart.abs()
    exact = num_buckets // 2
    far = (apart.clamp(min=1).double() / exact).log() / math.log(furthest / exact) * (num_buckets - exact)
    return side + torch.where(apart < exact, apart, (exact + far.long()).clamp(max=num_buckets - 1))


def sinusoids(positions: Tensor, dim: int, longest: float = 10_000.0) -> Tensor:
    """Vaswani et al., arXiv 1706.03762: sines and then cosines, float32 ``[T, dim]`` of ``positions [T]``.

    Wavelengths are ``2 pi`` to ``2 pi longest`` in a geometric row, both ends included, as in tensor2tensor.
    """
    scales = torch.arange(dim // 2, device=positions.device, dtype=torch.float64) / max(1, dim // 2 - 1)
    angles = positions.double()[:, None] * float(longest) ** -scales
    return pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim % 2)).float()


def interleaved_sinusoids(positions: Tensor, dim: int) -> Tensor:
    """As :func:`sinusoids`, a sine before its cosine, float32 ``[T, dim]``, of wavelengths 2 pi 10000^(2 i / dim)."""
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10_000.0) / dim))
    angles = positions[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dim]
