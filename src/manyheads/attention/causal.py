# SPDX-License-Identifier: Apache-2.0
"""What torch's own attention needs to be told: anchors at the bottom right, gradients of a bias."""

import torch
from torch import Tensor

from .reference import repeat_kv

__all__ = ["causal_tail", "for_gradient_of"]


def causal_tail(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Attention anchored at the bottom right: query t of T sees the keys up to ``S - T + t``.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, S, d]`` with S >= T.
        scale: factor on ``q k^T``.
        dropout: probability on the weights.

    Returns:
        ``[B, T, H, dv]``.
    """
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    if q.is_cuda and q.dtype != torch.float32 and q.shape[-1] == v.shape[-1] <= 256 and not q.requires_grad:
        # The flash kernel anchors at the bottom right; scaled_dot_product_attention would not reach it with S > T.
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True, scale=scale)
        answer: Tensor = found[0]
        return answer.transpose(1, 2)
    from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes seconds

    bias = causal_lower_right(q.shape[2], k.shape[2])
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
    return out.transpose(1, 2)


def for_gradient_of(bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q`` as torch's fused kernels need it where only ``bias`` asks for a gradient, as on frozen weights.

    They keep what their backward pass reads when q, k or v ask for one, and fail in it otherwise.
    """
    if bias is None or not bias.requires_grad or q.requires_grad or k.requires_grad or v.requires_grad:
        return q
    return q.detach().requires_grad_()
