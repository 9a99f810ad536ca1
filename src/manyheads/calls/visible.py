# SPDX-License-Identifier: Apache-2.0
"""Which keys each row of a call may attend to, a float mask that stands in its bias too, and how many."""

import torch
from torch import Tensor

from ..call import AttentionCall

__all__ = ["keys_seen", "real", "rows_of", "visible"]


def real(bias: Tensor) -> Tensor:
    """Where additive logits are a bias and not a mask."""
    return bias > torch.finfo(bias.dtype).min / 4


def visible(call: AttentionCall) -> Tensor | None:
    """All that masks ``call``: broadcastable to ``[B, H, T, S]``, None where every row sees every key."""
    allowed = call.allowed()
    if call.bias is None:
        return allowed
    return real(call.bias) if allowed is None else allowed & real(call.bias)


def keys_seen(call: AttentionCall) -> Tensor:
    """How many keys each row may attend to, ``[B or 1, H or 1, T or 1]``."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    if call.is_causal and call.mask is None and call.bias is None:  # needs no mask of all pairs
        return torch.arange(keys - queries + 1, keys + 1, device=call.q.device)[None, None]
    allowed = visible(call)
    if allowed is None:
        return torch.full((1, 1, 1), keys, device=call.q.device)
    return allowed.expand(*allowed.shape[:-1], keys).sum(-1)


def rows_of(call: AttentionCall, rows: Tensor) -> AttentionCall:
    """The call of some of its queries, ``rows [R]``: what they see is then in its mask."""

    def taken(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[-2] == 1 else x[..., rows, :]

    mask = taken(call.mask)
    if call.is_causal:
        size, length = call.k.shape[2], call.q.shape[2]
        causal = torch.arange(size, device=call.q.device) <= (rows + size - length)[:, None]
        mask = causal[None, None] if mask is None else mask & causal
    return call.replace(q=call.q[:, :, rows], mask=mask, bias=taken(call.bias), is_causal=False)
