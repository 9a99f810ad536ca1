# SPDX-License-Identifier: Apache-2.0
"""How much attention each key received: column sums of the softmax weights, block by block, without a map of T x S."""

from torch import Tensor

from . import reference

__all__ = ["accumulated_attention"]


def accumulated_attention(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Sum of the softmax weights on each key over all queries and over the query heads of its group.

    Args:
        q: queries ``[B, H, T, d]``.
        k: keys ``[B, Hkv, S, d]``.
        q_positions: ``[B, T]``, -1 for padding.
        k_positions: ``[B, Hs, S]``, -1 for an empty slot; a query sees the positions up to its own.
        scale: factor on ``q k^T``.
        softcap, sinks: as in the attention call.
        causal: the positions say no more than "causal, anchored at the bottom right": a kernel may be used.

    Returns:
        ``[B, Hkv, S]``, float32 or wider.
    """
    batch, heads, length, _ = q.shape
    kv_heads, size = k.shape[1], k.shape[2]
    if causal and q.is_cuda and softcap is None and sinks is None:
        from .. import kernels

        if kernels.available():
            from ..kernels import accumulated_attention as kernel

            return kernel.accumulated_attention(q, k, scale=scale)
    total = reference.widened(k.new_zeros(batch, kv_heads, size))
    block = reference.block_size(q, batch * heads * size)
    for start in range(0, length, block):
        cut = slice(start, start + block)
        grouped = reference.widened(q[:, :, cut]).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # keys are not repeated
        x = reference.logits(grouped, reference.widened(k), scale=scale, softcap=softcap).unflatten(
            2, (heads // kv_heads, -1)
        )
        x = x.flatten(1, 2)
        mask = (k_positions >= 0)[:, :, None] & (k_positions[:, :, None] <= q_positions[:, None, cut, None])
        weights = reference.softmax(x, reference.repeat_kv(mask, heads), sinks)
        total += weights.sum(2).unflatten(1, (kv_heads, -1)).sum(2)
    return total
