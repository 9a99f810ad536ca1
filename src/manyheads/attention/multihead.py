# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with masks that may hide everything, whose weights can be shown."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["MultiHead"]


class MultiHead(nn.Module):
    """Multi-head attention of ``q [B, T, D]`` to ``x [B, S, D]``; ``mask [B, S]`` or ``[B, T, S]``, True: seen.

    A row that sees nothing gets 0.

    Attributes:
        shown: weights ``[B, T, S]`` of the last forward, a mean over heads; kept where ``show`` is set.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.show, self.shown = False, torch.empty(0)

    def projected(self, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, T, D/H]``, keys and values ``[B, H, S, D/H]``."""
        rows = [project(y) for project, y in ((self.q, q), (self.k, x), (self.v, x))]
        queries, keys, values = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in rows)
        return queries, keys, values

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, None] if mask.dim() == 2 else mask
        q, k, v = self.projected(q, x)
        sees = mask.any(-1)
        seen = (mask | ~sees[..., None])[:, None]  # what sees nothing looks at all, and is set to 0 below
        if self.show:
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
            self.shown = (scores.softmax(-1).mean(1) * sees[..., None]).detach()
        found = scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0)
        made: Tensor = self.out(found.transpose(1, 2).flatten(2)) * sees[..., None]
        return made
