# SPDX-License-Identifier: Apache-2.0
"""Attention written from its formula: the yardstick of every faster path, in whatever dtype it is given.

Legend: B batch, H query heads, Hkv key/value heads (H = G * Hkv), T queries, S keys, d head dimension.
Query ``t`` stands at key column ``S - T + t`` (bottom-right anchor), so a causal query sees the ``S - T`` earlier
keys too. A row that may attend to nothing gives 0 with zero gradient, never NaN.
"""

import torch
from torch import Tensor

__all__ = ["attention", "block_size", "causal_mask", "logits", "logsumexp", "repeat_kv", "softmax", "widened"]

_SCRATCH = {"cpu": 2**24, "cuda": 2**26}  # numbers; a GPU waits for the launches of small blocks


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it comes so: what scores and other choices are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def block_size(x: Tensor, per_row: int) -> int:
    """Rows of ``per_row`` numbers that a computation on the device of ``x`` holds at once, at least 1."""
    return max(1, _SCRATCH.get(x.device.type, _SCRATCH["cpu"]) // max(1, per_row))


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """Repeat key/value heads for their query groups. ``[B, Hkv, S, d] -> [B, H, S, d]``, heads interleaved."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def causal_mask(num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean ``[T, S]``, True = attend, anchored at the bottom right."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


def logits(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """``softcap * tanh(scale * q k^T / softcap) + bias``, shape ``[B, H, T, S]``; no cap when ``softcap`` is None."""
    x = (q @ repeat_kv(k, q.shape[1]).transpose(-1, -2)) * scale
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    return x if bias is None else x + bias


def _sink_column(x: Tensor, sinks: Tensor) -> Tensor:
    return sinks.to(x.dtype).reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2], 1)


def softmax(x: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last axis with defined empty rows.

    Args:
        x: logits ``[B, H, T, S]``.
        mask: boolean, broadcastable to ``x``; True = attend.
        sinks: ``[H]`` learned logits that take mass and give none back (gpt-oss), so rows may sum to less than 1.
    """
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    top = x.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, _sink_column(x, sinks))
    top = top.masked_fill(top == -torch.inf, 0.0).detach()
    e = torch.exp(x - top)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(_sink_column(x, sinks) - top)
    return e / total.masked_fill(total == 0, 1.0)


def logsumexp(x: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """Row log-sum-exp ``[B, H, T]`` of masked logits; ``-inf`` for empty rows."""
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        x = torch.cat([x, _sink_column(x, sinks)], -1)
    return x.logsumexp(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Dense attention. q ``[B, H, T, d]``, k ``[B, Hkv, S, d]``, v ``[B, Hkv, S, dv]`` -> ``[B, T, H, dv]``."""
    if is_causal:
        causal = causal_mask(q.shape[2], k.shape[2], q.device)
        mask = causal if mask is None else mask & causal
    weights = softmax(logits(q, k, scale=scale, bias=bias, softcap=softcap), mask, sinks)
    return (weights @ repeat_kv(v, q.shape[1])).transpose(1, 2)
