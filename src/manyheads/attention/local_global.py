# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over the keys around a query and over keys that stand for whole blocks, both in one softmax.

What LongT5 (arXiv 2112.07916) calls transient-global attention, bidirectional. Query t sees the keys less than
``window`` positions away, and one *side* key for each block of ``size`` tokens of its sequence. Tokens behind the last
whole block belong to it; a sequence of less than one block has no side keys. Biases depend on a distance only, so each
is a table of ``2 n - 1`` numbers per head, whose middle is distance 0: key less query, and side key less block of the
query. Cost: ``T (3 window + T / size)`` pairs, in torch; FlexAttention skips what the window does not reach.
"""

from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UserError
from .masks import neighbours
from .reference import repeat_kv, softmax, widened

__all__ = ["block_sums", "blocks_and_counts", "local_global_attention"]

_FLEX_FROM = 2048  # tokens; below, a compiled kernel is not worth its seconds


def blocks_and_counts(lengths: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """The block of every token ``[B, T]``, -1 where a sequence has none and behind its end, and how many ``[B]``.

    Args:
        lengths: ``[B]`` tokens of sequences that begin at column 0.
        size: tokens of a block.
        longest: T.
    """
    at = torch.arange(longest, device=lengths.device)
    counts = lengths // size
    blocks = torch.minimum(at // size, counts[:, None] - 1)
    return blocks.masked_fill(at >= lengths[:, None], -1), counts


def block_sums(x: Tensor, blocks: Tensor, count: int) -> Tensor:
    """Sum of the tokens of each block.

    Args:
        x: ``[B, T, D]``.
        blocks: ``[B, T]`` block of every token; -1 for none.
        count: blocks G of a row.

    Returns:
        ``[B, G, D]`` in float32, or float64 for float64.
    """
    sums = widened(x).new_zeros(x.shape[0], count + 1, x.shape[2])
    at = torch.where(blocks < 0, count, blocks)[..., None].expand_as(x)
    return sums.scatter_add(1, at, widened(x))[:, :count]


def local_global_attention(
    q: Tensor, k: Tensor, v: Tensor, side_k: Tensor, side_v: Tensor, *, scale: float, window: int, size: int,
    bias: Tensor, side_bias: Tensor, lengths: Tensor | None = None, impl: Literal["auto", "torch", "flex"] = "auto",
) -> Tensor:  # fmt: skip
    """Attention over a window and over side keys.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, T, d]``; each head for H / Hkv query heads.
        side_k, side_v: ``[B, Hkv, G, d]`` of the blocks; G = ``T // size``, or 0 for none at all.
        scale: factor on ``q k^T``.
        window: keys less than so many positions away are seen, on either side.
        size: tokens of a block.
        bias: ``[H, 2 window - 1]`` logits by ``key - query``.
        side_bias: ``[H, 2 G - 1]``, or more on both sides, logits by ``side key - block of the query``.
        lengths: ``[B]`` tokens of the sequences, which begin at column 0; None for T.
        impl: ``auto`` takes FlexAttention on a GPU for long sequences of one length, else torch.

    Returns:
        ``[B, H, T, d]`` in the dtype of q, with gradients to q, k, v, side keys and values, and biases. What stands
        behind the end of a sequence is finite and means nothing.

    Raises:
        UserError: shapes that do not belong together, or FlexAttention asked for with ``lengths``.
    """
    heads, length, count = q.shape[1], q.shape[2], side_k.shape[2]
    if window < 1 or bias.shape != (heads, 2 * window - 1) or k.shape[2] != length:
        raise UserError(f"a window of {window} for q {tuple(q.shape)} needs a bias [H, 2 window - 1]: {bias.shape}")
    if count not in (0, length // size) or side_bias.shape[-1] < 2 * count - 1 or side_bias.shape[-1] % 2 == 0:
        raise UserError(f"{length} tokens in blocks of {size} for {count} side keys and biases {side_bias.shape}")
    if impl == "flex" and lengths is not None:
        raise UserError("impl=flex takes sequences of one length only")
    if impl == "flex" or (impl == "auto" and q.is_cuda and lengths is None and length >= _FLEX_FROM):
        return _flex(q, k, v, side_k, side_v, scale, window, size, bias, side_bias)
    return _torch(q, k, v, side_k, side_v, scale, window, size, bias, side_bias, lengths)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, side_k: Tensor, side_v: Tensor, scale: float, window: int, size: int,
    bias: Tensor, side_bias: Tensor, lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    (_, heads, length, _), count, device = q.shape, side_k.shape[2], q.device
    more = -length % window
    ends = torch.full((1,), length, device=device) if lengths is None else lengths
    block, counts = blocks_and_counts(ends, size, length + more)  # [B or 1, T], [B or 1]

    queries = pad(q, (0, 0, 0, more)).unflatten(2, (-1, window))  # [B, H, n, w, d]
    keys, values = (neighbours(pad(repeat_kv(x, heads), (0, 0, 0, more)).unflatten(2, (-1, window))) for x in (k, v))
    apart = torch.arange(-window, 2 * window, device=device) - torch.arange(window, device=device)[:, None]  # [w, 3w]
    column = torch.arange(0, length + more, window, device=device)[:, None] + torch.arange(
        -window, 2 * window, device=device
    )  # [n, 3w]
    near = widened(queries @ keys.mT) * scale + bias[:, (apart + window - 1).clamp(0, 2 * window - 2)][:, None]
    seen = (apart.abs() < window) & ((column >= 0) & (column < ends[:, None, None]))[:, :, None]
    seen = seen | (apart == 0)  # what stands behind the end sees itself, and so something

    side_keys, side_values = repeat_kv(side_k, heads), repeat_kv(side_v, heads)
    side = torch.arange(count, device=device)
    offset = (side - block[..., None] + side_bias.shape[1] // 2).clamp(0, side_bias.shape[1] - 1)  # [B or 1, T, G]
    far = widened(pad(q, (0, 0, 0, more)) @ side_keys.mT) * scale + side_bias[:, offset].transpose(0, 1)
    whole = (side < counts[:, None])[:, None].expand(-1, length + more, -1).unflatten(1, (-1, window))

    logits = torch.cat([near, far.unflatten(2, (-1, window))], -1)
    mask = torch.cat([seen.expand(len(ends), -1, -1, -1), whole], -1)[:, None]
    weights = softmax(logits, mask).to(v.dtype)
    out = weights[..., : 3 * window] @ values
    out = out + (weights[..., 3 * window :].flatten(2, 3) @ side_values).unflatten(2, (-1, window))
    found: Tensor = out.flatten(2, 3)[:, :, :length]
    return found


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
def _block_mask(length: int, count: int, window: int, device: str) -> Any:
    """Of keys that are the tokens and behind them the side keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s >= length) | ((t - s < window) & (s - t < window))

    return create_block_mask(mask_mod, None, None, length, length + count, device=device)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, side_k: Tensor, side_v: Tensor, scale: float, window: int, size: int,
    bias: Tensor, side_bias: Tensor,
) -> Tensor:  # fmt: skip
    from torch.nn.attention.flex_attention import flex_attention

    length, count = q.shape[2], side_k.shape[2]
    tables = torch.cat([bias, side_bias], 1)  # one table that has a gradient
    middle, start, last = window - 1, 2 * window - 1, max(count - 1, 0)
    center = start + side_bias.shape[1] // 2

    def biased(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        near = (s - t + middle).clamp(0, 2 * middle)
        far = (s - length - (t // size).clamp(max=last) + center).clamp(start, tables.shape[1] - 1)
        return score + tables[h, torch.where(s < length, near, far)]

    attend = _compiled() if q.is_cuda else flex_attention
    keys, values = torch.cat([k, side_k], 2), torch.cat([v, side_v], 2)
    mask = _block_mask(length, count, window, str(q.device))
    # Places in the tables of biases take shared memory beside keys and values: with FlexAttention's own tiles more than
    # an H100 or H200 has.
    options = {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 1 if q.dtype == torch.float32 else 2}
    out: Tensor = attend(
        q, keys, values, score_mod=biased, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )  # fmt: skip
    return out
