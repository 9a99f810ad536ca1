# SPDX-License-Identifier: Apache-2.0
"""Builders of block patterns: dense, windows, sinks, A-shape, vertical and slash lines, documents, top-k and top-p.

Legend as in :mod:`.block_pattern`. Patterns are combined by ``|``, ``&`` and ``~``.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .block_pattern import BlockPattern, Rule, blocks_of, edges
from .reference import repeat_kv, widened

__all__ = ["a_shape", "block_means", "dense", "mean_scores", "packed", "sinks", "top_k", "top_p", "vertical_slash"]


def _meets(rule: Rule, first: Tensor, last: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Whether any query of ``first .. last`` sees any key of ``start .. stop``."""
    seen = start <= last if rule.causal else torch.ones_like(start <= last)
    if rule.window is not None:
        seen = seen & (first - stop < rule.window)
        if not rule.causal:
            seen = seen & (start - last < rule.window)
    return seen


def dense(
    num_queries: int, num_keys: int, *, rule: Rule | None = None, block_q: int = 128, block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPattern:  # fmt: skip
    """All blocks of which ``rule`` shows anything: causal, or a sliding window."""
    first, last = edges(num_queries, block_q, num_keys - num_queries, device)
    start, stop = edges(num_keys, block_k, 0, device)
    return BlockPattern.from_blocks(
        _meets(rule or Rule(), first[:, None], last[:, None], start, stop)[None, None], num_queries, num_keys,
        block_q=block_q, block_k=block_k,
    )  # fmt: skip


def sinks(
    num_queries: int, num_keys: int, keys: int = 4, queries: int = 0, *, block_q: int = 128,
    block_k: int = 128, device: torch.device | str = "cpu",
) -> BlockPattern:  # fmt: skip
    """The first ``keys`` keys for all, and all keys for the last ``queries`` queries; both in whole blocks."""
    _, last = edges(num_queries, block_q, num_keys - num_queries, device)
    start, _ = edges(num_keys, block_k, 0, device)
    blocks = (start < keys) | (last >= num_keys - queries)[:, None]
    return BlockPattern.from_blocks(blocks[None, None], num_queries, num_keys, block_q=block_q, block_k=block_k)


def a_shape(
    num_queries: int, num_keys: int, keys: int, window: int, *, block_q: int = 128, block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPattern:  # fmt: skip
    """The first ``keys`` keys and a causal window, in whole blocks (StreamingLLM, arXiv 2309.17453)."""
    sizes: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "device": device}
    near = dense(num_queries, num_keys, rule=Rule(True, window), **sizes)
    return near | sinks(num_queries, num_keys, keys, **sizes)


def vertical_slash(
    vertical: Tensor, slash: Tensor, num_queries: int, num_keys: int, *, block_q: int = 128, block_k: int = 1
) -> BlockPattern:
    """Keys that all read, and diagonals (MInference, arXiv 2407.02490).

    Args:
        vertical: ``[B or 1, H or 1, n]`` columns of keys.
        slash: ``[B or 1, H or 1, m]`` distances, column of the query less column of the key. A block of queries
            reads all that any of its queries has on the line.
        num_queries, num_keys, block_q, block_k: as the attributes.
    """
    shift = num_keys - num_queries
    first, last = edges(num_queries, block_q, shift, vertical.device)
    columns = blocks_of(num_keys, block_k)
    batch, heads = torch.broadcast_shapes(vertical.shape[:2], slash.shape[:2])
    blocks = torch.zeros(batch, heads, len(first), columns + 1, dtype=torch.bool, device=vertical.device)
    lines = (vertical // block_k)[:, :, None].expand(batch, heads, len(first), -1)
    blocks.scatter_(3, lines.long(), True)
    low = ((first[:, None] - slash[:, :, None]).clamp(min=0)) // block_k  # [B, H, n_q, m]
    high = (last[:, None] - slash[:, :, None]).clamp(max=num_keys - 1)
    high = torch.where(high < 0, low - 1, high.div(block_k, rounding_mode="floor"))
    ends = blocks.new_zeros(blocks.shape, dtype=torch.int32)  # +1 where a band begins, -1 behind its end
    one = torch.ones_like(low, dtype=torch.int32).expand(batch, heads, -1, -1)
    shape = one.shape
    ends.scatter_add_(3, low.expand(shape).clamp(max=columns).long(), one)
    ends.scatter_add_(3, (high + 1).expand(shape).clamp(max=columns).long(), -one)
    blocks |= ends.cumsum(3) > 0
    return BlockPattern.from_blocks(blocks[..., :columns], num_queries, num_keys, block_q=block_q, block_k=block_k)


def packed(cu_seqlens: Tensor, *, rule: Rule | None = None, block_q: int = 128, block_k: int = 128) -> BlockPattern:
    """All blocks that hold a pair of one of the sequences whose bounds ``cu_seqlens [N + 1]`` are."""
    length = int(cu_seqlens[-1])
    parts = []
    for size in (block_q, block_k):
        first, last = edges(length, size, 0, cu_seqlens.device)
        parts.append([torch.searchsorted(cu_seqlens, x, right=True) for x in (first, last)])
    (first, last), (start, stop) = parts
    together = (first[:, None] <= stop) & (start <= last[:, None])
    seen = dense(length, length, rule=rule, block_q=block_q, block_k=block_k, device=cu_seqlens.device).blocks()
    return BlockPattern.from_blocks(seen & together, length, length, block_q=block_q, block_k=block_k)


def top_k(
    scores: Tensor, count: int, num_queries: int, num_keys: int, *, rule: Rule | None = None,
    block_q: int = 128, block_k: int = 128,
) -> BlockPattern:  # fmt: skip
    """For each block of queries the ``count`` visible key blocks of the greatest ``scores [B, H, n_q, n_k]``."""
    scores = _visible(scores, rule or Rule(), num_queries, num_keys, block_q, block_k)
    top = scores.topk(min(count, scores.shape[3]), dim=3)
    lists = top.indices.masked_fill(top.values == -torch.inf, -1)
    return BlockPattern.from_lists(lists, num_queries, num_keys, block_q=block_q, block_k=block_k)


def top_p(
    scores: Tensor, mass: float, num_queries: int, num_keys: int, *, rule: Rule | None = None,
    least: int = 1, most: int | None = None, block_q: int = 128, block_k: int = 128,
) -> BlockPattern:  # fmt: skip
    """For each block of queries the fewest key blocks with ``mass`` of the softmax of the scores.

    Args:
        scores: ``[B, H, n_q, n_k]`` logits of blocks; of probabilities give the logarithm.
        mass: share of 1 that the blocks hold together at least.
        least, most: bounds on the number of blocks.
        rule, num_queries, num_keys, block_q, block_k: as for the others.
    """
    scores = _visible(scores, rule or Rule(), num_queries, num_keys, block_q, block_k)
    ranked = scores.softmax(3).nan_to_num(0.0).sort(dim=3, descending=True, stable=True)
    before = ranked.values.cumsum(3) - ranked.values
    place = torch.arange(scores.shape[3], device=scores.device)
    kept = (before < mass) | (place < least)
    if most is not None:
        kept = kept & (place < most)
    kept = kept & (scores.gather(3, ranked.indices) > -torch.inf)
    lists = ranked.indices.masked_fill(~kept, -1)[..., : most or scores.shape[3]]
    return BlockPattern.from_lists(lists, num_queries, num_keys, block_q=block_q, block_k=block_k)


def _visible(scores: Tensor, rule: Rule, num_queries: int, num_keys: int, block_q: int, block_k: int) -> Tensor:
    """Scores with -inf where the rule shows nothing of a block."""
    first, last = edges(num_queries, block_q, num_keys - num_queries, scores.device)
    start, stop = edges(num_keys, block_k, 0, scores.device)
    if scores.shape[2:] != (len(first), len(start)):
        raise UserError(f"scores {tuple(scores.shape)} are not of {len(first)} x {len(start)} blocks")
    return scores.masked_fill(~_meets(rule, first[:, None], last[:, None], start, stop), -torch.inf)


def block_means(x: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Mean of each block of ``size`` tokens.

    Args:
        x: ``[B, H, N, d]``.
        size: tokens of a block; the last block may have fewer.
        valid: ``[B, N]``, tokens that count; a block without any has the mean 0.

    Returns:
        ``[B, H, ceil(N / size), d]`` in float32, or float64 for float64.
    """
    batch, _, length, _ = x.shape
    weight = x.new_ones(batch, length) if valid is None else valid.to(x.dtype)
    pad = -length % size
    total = torch.nn.functional.pad(widened(x) * widened(weight)[:, None, :, None], (0, 0, 0, pad))
    count = torch.nn.functional.pad(widened(weight), (0, pad)).unflatten(1, (-1, size)).sum(2)
    means: Tensor = total.unflatten(2, (-1, size)).sum(3) / count.clamp(min=1)[:, None, :, None]
    return means


def mean_scores(
    q: Tensor, k: Tensor, *, scale: float, block_q: int = 128, block_k: int = 128, valid: Tensor | None = None
) -> Tensor:
    """Logits ``[B, H, n_q, n_k]`` of the means of blocks of queries and keys, in float32 or float64.

    Args:
        q: ``[B, H, T, d]``.
        k: ``[B, Hkv, S, d]``.
        scale: factor on the product.
        block_q, block_k: sizes of the blocks.
        valid: ``[B, S]``, keys that are tokens; a block without any gets -inf.
    """
    keys = repeat_kv(block_means(k, block_k, valid), q.shape[1])
    scores = block_means(q, block_q) @ keys.transpose(2, 3) * scale
    if valid is None:
        return scores
    some = torch.nn.functional.pad(valid, (0, -valid.shape[1] % block_k)).unflatten(1, (-1, block_k)).any(2)
    return scores.masked_fill(~some[:, None, None], -torch.inf)
