# SPDX-License-Identifier: Apache-2.0
"""What ``video_blade`` is compared with: other choices of as many blocks, everything else alike.

- ``mean``: logits of the mean query and mean key of blocks, as most block-sparse attention without training has them.
- ``window``: blocks that stand nearest in the order; the same at every step.
- ``random``: drawn anew at every call.
- ``oracle``: the attention that each block really has, by the whole map: what no choice of blocks can exceed on
  average. It is no strategy to use.

Shapes as in ``video_blade``.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention.block_pattern import blocks_of
from ...attention.patterns import mean_scores
from ...call import AttentionCall
from .video_blade import VideoBlade

__all__ = ["Rival"]


@dataclass(frozen=True, kw_only=True)
class Rival(VideoBlade):
    """Other choices of blocks.

    Attributes:
        by: how they are chosen.
    """

    by: Literal["mean", "window", "random", "oracle"] = field(
        default="mean", metadata={"help": "what ranks the blocks: their means, nearness, chance or the whole map"}
    )

    def scores(self, call: AttentionCall, q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        n = int(blocks_of(length, self.block))
        sizes = {"block_q": self.block, "block_k": self.block}
        if self.by == "mean":
            return mean_scores(q, k, scale=call.scale, valid=valid, **sizes)
        if self.by == "oracle":
            logits = q.float() @ k.float().transpose(2, 3) * call.scale
            if valid is not None:
                logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
            cut = (0, n * self.block - length)
            weights: Tensor = (
                pad(logits.softmax(-1), (*cut, *cut)).unflatten(3, (n, -1)).sum(4).unflatten(2, (n, -1)).sum(3)
            )
            return weights.log()
        if self.by == "window":
            place = torch.arange(n, device=q.device, dtype=torch.float32)
            return -(place[:, None] - place).abs().expand(batch, heads, n, n)
        calls = call.state["calls"] = call.state.get("calls", 0) + 1
        source = torch.Generator().manual_seed(self.seed + 1_000_003 * call.site.index + 7919 * calls)
        return torch.rand(batch, heads, n, n, generator=source).to(q.device)
