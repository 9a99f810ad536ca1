# SPDX-License-Identifier: Apache-2.0
"""A block pattern as FlexAttention wants it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .block_pattern import BlockPattern, Rule, listed

__all__ = ["block_mask"]


def block_mask(pattern: BlockPattern, rule: Rule, documents: tuple[Tensor, Tensor] | None = None) -> Any:
    """FlexAttention's ``BlockMask`` of a block pattern.

    Args:
        pattern: what is read.
        rule: what is seen.
        documents: numbers ``[B or 1, T]`` and ``[B or 1, S]``; a query sees the keys of its own.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    blocks, shift, block_q, block_k = pattern.blocks(), pattern.shift, pattern.block_q, pattern.block_k

    def mask_mod(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        row = b if blocks.shape[0] > 1 else b * 0
        head = h if blocks.shape[1] > 1 else h * 0
        seen = rule.allows(t + shift, s) & blocks[row, head, t // block_q, s // block_k]
        if documents is not None:
            mine, theirs = (x[b if x.shape[0] > 1 else b * 0] for x in documents)
            seen = seen & (mine[t] == theirs[s])
        return seen

    if (key := ("flex", rule)) in pattern._memo and documents is None:
        return pattern._memo[key]
    if block_q % 128 or block_k % 128 or documents is not None:
        batch = max(blocks.shape[0], 1 if documents is None else max(x.shape[0] for x in documents))
        sizes = batch, blocks.shape[1], pattern.num_queries, pattern.num_keys
        made = create_block_mask(mask_mod, *sizes, device=str(blocks.device))
        return made if documents is not None else pattern._memo.setdefault(key, made)

    lists = pattern.lists(rule)
    place = torch.arange(pattern.indices.shape[3], device=blocks.device)
    first, left, right, last = lists.spans[..., None].unbind(-2)
    whole = (place >= left) & (place < right)
    lengths, tables = [], []
    for kept in ((place >= first) & (place < last) & ~whole, whole):
        lengths.append(kept.sum(-1, dtype=torch.int32))
        table = replace(pattern, indices=pattern.indices.masked_fill(~kept, pattern.columns), _memo={}).blocks()
        tables.append(listed(table, pattern.columns).clamp(max=pattern.columns - 1))
    pattern._memo[key] = BlockMask.from_kv_blocks(
        lengths[0], tables[0], lengths[1], tables[1], BLOCK_SIZE=(block_q, block_k), mask_mod=mask_mod,
        seq_lengths=(pattern.num_queries, pattern.num_keys),
    )  # fmt: skip
    return pattern._memo[key]
