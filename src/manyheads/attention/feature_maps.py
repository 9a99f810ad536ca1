# SPDX-License-Identifier: Apache-2.0
"""Feature maps that stand for the kernel of softmax attention, and linear attention over them.

``phi(q) . phi(k)`` stands for ``exp(q . k)``, so that attention is ``phi(q) (phi(K)^T V)`` and a state of fixed size:

    dct      softmax over features of  T C x                      DiJiang (arXiv 2403.19928), its released code
    wdct     D * exp(T C x')                                      the same, its paper; D is learned
    favor    exp(r_i w_i . x' - |x'|^2 / 2) / sqrt(m)             FAVOR+ of Performer (arXiv 2009.14794)
    elu      elu(x) + 1                                           Linear Transformer (arXiv 2006.16236)

C is the orthonormal DCT-II, T a diagonal of fixed draws ``t_i = Q(u_i)``, u uniform; there are m = d features. Q is the
quantile function of a standard normal (``normal``, DiJiang) or of a chi distribution of d degrees (``chi``): only with
the latter, and directions that are uniform on the sphere, is ``exp(t_i v_i . x - |x|^2 / 2)`` without bias for d > 1.
w_i are orthogonal random directions, r_i chi draws. Exponentials take ``x' = d^(1/4) x / rms(x) / sqrt(d)``, so that
``x' . y'`` is as large as logits are, and no exponential overflows, at any scale of x: the paper leaves ``|x|^2`` out
since "x is usually normalised", and says no more; here it is, in these two.
"""

from __future__ import annotations

from math import log
from typing import Literal

import torch
from torch import Tensor, nn

from .recurrence import DecayState, decay_attention

__all__ = ["FeatureMap", "Features", "KernelAttention", "Radial", "dct_matrix", "radii", "retention_decay"]

Features = Literal["dct", "wdct", "favor", "elu"]
Radial = Literal["normal", "chi"]


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II ``[n, n]`` float64: row i is ``cos(pi (2 j + 1) i / 2 n)``, scaled to length 1."""
    i = torch.arange(size, dtype=torch.float64, device="cpu")  # also where parameters are made on meta
    rows: Tensor = torch.cos(torch.pi * (2 * i + 1) * i[:, None] / (2 * size)) * (2 / size) ** 0.5
    rows[0] *= 0.5**0.5
    return rows


def radii(count: int, dim: int, radial: Radial, source: torch.Generator) -> Tensor:
    """``t_i = Q(u_i)`` for uniform draws, float64 ``[count]``."""
    u = torch.rand(count, generator=source, dtype=torch.float64, device="cpu").clamp(1e-6, 1 - 1e-6)
    if radial == "normal":
        drawn: Tensor = torch.special.ndtri(u)
        return drawn
    from scipy.stats import chi

    return torch.from_numpy(chi.ppf(u.numpy(), dim))


def retention_decay(heads: int) -> Tensor:
    """RetNet's log decay of each head, float32 ``[H]``: ``log(1 - 2^-x)``, x from 5 to 9."""
    return torch.log1p(-torch.exp(torch.linspace(log(1 / 32), log(1 / 512), heads)))


class FeatureMap(nn.Module):
    """``[..., d] -> [..., d]``, no entry negative but for ``wdct`` with a D that learned to be.

    Args:
        kind: see the head of this file.
        dim: d.
        radial: of ``dct`` and ``wdct``.
        seed: of the draws.
    """

    directions: Tensor

    def __init__(self, kind: Features, dim: int, radial: Radial = "normal", seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        source = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.ones(dim)) if kind == "wdct" else None
        if kind == "elu":
            return
        if kind == "favor":
            drawn = torch.randn(dim, dim, generator=source, dtype=torch.float64, device="cpu")
            rows = torch.linalg.qr(drawn).Q.T * radii(dim, dim, "chi", source)[:, None]
        else:
            rows = dct_matrix(dim) * radii(dim, dim, radial, source)[:, None]
        self.register_buffer("directions", rows.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In float32 or better."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "elu":
            return nn.functional.elu(x) + 1
        if self.kind == "dct":
            return (x @ self.directions.T.to(x.dtype)).softmax(-1)
        x = nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * x.shape[-1] ** -0.25
        y: Tensor = x @ self.directions.T.to(x.dtype)
        if self.weight is not None:
            return y.exp() * self.weight.to(x.dtype)
        y = y - x.square().sum(-1, keepdim=True) / 2 - log(x.shape[-1]) / 2
        return y.exp()


class KernelAttention(nn.Module):
    """Linear attention of queries, keys and values over a feature map.

    Args:
        heads, kv_heads, dim: H, G and d.
        features, radial, seed: of the map.
        decay: heads forget at RetNet's rates.
        norm: ``sum`` divides by the sum of the weights; ``group`` by the size of each head's output (GroupNorm, with a
            gain and an offset a channel), as RetNet and DiJiang's code, which have no denominator.
    """

    decay: Tensor | None

    def __init__(
        self, heads: int, kv_heads: int, dim: int, features: Features, radial: Radial = "normal", decay: bool = False,
        norm: Literal["sum", "group"] = "sum", seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.map = FeatureMap(features, dim, radial, seed)
        self.register_buffer("decay", retention_decay(kv_heads) if decay else None, persistent=False)
        self.norm = nn.GroupNorm(heads, heads * dim) if norm == "group" else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, state: DecayState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, DecayState]:  # fmt: skip
        """``[B, T, H * d]``, in the dtype of ``q``, and the state after the last token.

        Args:
            q: ``[B, H, T, d]``.
            k, v: ``[B, G, T, d]``.
            mask: ``[B, T]``, True for tokens: padding neither enters nor lets the heads forget.
            state: what came before.
            cu_seqlens: ``[N + 1]`` bounds of N sequences packed in one row.
        """
        dtype, decay = q.dtype, self.decay
        q, k = self.map(q), self.map(k)
        if mask is not None:
            k = k * mask[:, None, :, None]
            decay = None if decay is None else torch.where(mask[:, None], decay[:, None], 0.0)
        out, after = decay_attention(
            q, k, v, decay, norm="sum" if self.norm is None else None, state=state, cu_seqlens=cu_seqlens
        )
        wide: Tensor = out.transpose(1, 2).flatten(2)
        if self.norm is not None:
            wide = self.norm(wide.flatten(0, 1).to(self.norm.weight.dtype)).view(wide.shape)
        return wide.to(dtype), after
