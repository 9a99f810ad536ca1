# SPDX-License-Identifier: Apache-2.0
"""Edits of an attention computation: heads scaled, replaced or turned to the first token; biases, channels, more keys.

All are differentiable and none changes a tensor in place. Legend: B batch, H query heads, Hkv key/value heads, T
queries, S keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import AttentionCall, Site
from ..errors import UserError
from .head_names import Heads

__all__ = ["Heads", "add_bias", "append_kv", "heads_at", "replace_channels", "replace_heads", "scale_heads"]


def heads_at(heads: Sequence[str], site: Site, count: int | None = None) -> list[int]:
    """The heads of ``("layer.head", ...)`` that stand in the layer of ``site``.

    Raises:
        UserError: one of them is beyond the ``count`` heads that there are.
    """
    layer = site.index if site.layer is None else site.layer
    found = [int(name.partition(".")[2]) for name in heads if int(name.partition(".")[0]) == layer]
    if count is not None and max(found, default=0) >= count:
        raise UserError(f"{site.name} has heads 0 to {count - 1}, not {max(found)}")
    return found


def scale_heads(out: Tensor, factor: Tensor) -> Tensor:
    """Per-head outputs ``[B, T, H, dv]`` times ``factor [H]`` (or ``[B, H]``); 0 takes a head out."""
    return out * factor.to(out.dtype).reshape(-1, 1, factor.shape[-1], 1)


def replace_heads(out: Tensor, heads: Sequence[int], by: Tensor) -> Tensor:
    """Outputs ``[B, T, H, dv]`` with those of ``heads`` taken from ``by``, broadcastable to ``[B, T, n, dv]``."""
    made = out.clone()
    made[:, :, list(heads)] = by.to(out.dtype).expand(*out.shape[:2], len(heads), out.shape[3])
    return made


def add_bias(call: AttentionCall, bias: Tensor) -> AttentionCall:
    """Logits plus ``bias``, broadcastable to ``[B, H, T, S]``."""
    bias = bias.to(call.q.dtype)
    return call.replace(bias=bias if call.bias is None else call.bias + bias)


def append_kv(call: AttentionCall, k: Tensor, v: Tensor) -> AttentionCall:
    """One more key and value for each head, in front of all others and seen by every query.

    Args:
        call: the attention computation.
        k: ``[Hkv, d]``, v: ``[Hkv, dv]``.
    """
    batch, length, size = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    more = [x.to(call.k.dtype)[None, :, None].expand(batch, -1, 1, -1) for x in (k, v)]
    allowed, bias = call.allowed(), call.bias
    if allowed is None:
        allowed = torch.ones(1, 1, length, size, dtype=torch.bool, device=call.q.device)
    if allowed.shape[-1] == size:
        allowed = torch.cat([torch.ones_like(allowed[..., :1]), allowed], -1)
    if bias is not None and bias.shape[-1] == size:
        bias = torch.cat([torch.zeros_like(bias[..., :1]), bias], -1)
    return call.replace(
        k=torch.cat([more[0], call.k], 2), v=torch.cat([more[1], call.v], 2), mask=allowed, bias=bias, is_causal=False,
        prepended=call.prepended + 1,
    )  # fmt: skip


def replace_channels(x: Tensor, channels: Tensor, by: Tensor) -> Tensor:
    """``x [B, H, T, d]`` with the channels ``[B, H, n]`` of every token replaced by ``by [B, H, 1 or T, 1 or n]``."""
    index = channels[:, :, None].expand(-1, -1, x.shape[2], -1)
    return x.scatter(3, index, by.to(x.dtype).expand(index.shape))
