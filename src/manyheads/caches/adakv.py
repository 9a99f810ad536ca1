# SPDX-License-Identifier: Apache-2.0
"""Budgets of the heads of a layer from where its best scores are.

Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv
2407.11550. What eviction takes from a layer's output is bounded by the attention weight that it drops, summed over
heads. For a given total of slots that sum is least when the best weights of the layer stay, wherever they are: a head
whose attention is spread gets more, a head that looks at few tokens gets less. With h heads of equal budget b and
scores A_i of head i that can be compared between heads, as attention weights can:

    B*_i = how many of the h * b best scores of the layer are in A_i          B_i = alpha * b + (1 - alpha) * B*_i

The protected tokens of every head (SnapKV's window) stay outside this count. ``alpha`` guards heads with low scores.

Differs: ``alpha`` is the floor of the released code, 0.2 of the equal budget for every head; the paper prints the
formula with alpha on B*_i, also with 0.2. Slots that rounding leaves over, or that a head cannot fill because it has
dropped too much before, go to the best scores that are still out, so that the total is exact (the code rounds each
head). Heads of a group share a budget through the base's score, as in the paper's extension to grouped queries.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ._policy import must_stay
from ._view import CacheView
from ._wrap import Wrapper

__all__ = ["AdaKV"]


def _shares(ranked: Tensor, total: Tensor) -> Tensor:
    """How many of the ``total [B]`` best scores of each layer lie in each head: ``ranked [B, Hs, N]`` -> ``[B, Hs]``.

    Each head's scores come best first, -inf for none. Of equal scores the better ranked counts first, heads in turn.
    """
    heads = ranked.shape[1]
    best = ranked.transpose(1, 2).flatten(1).sort(dim=1, descending=True, stable=True)
    taken = (torch.arange(best.values.shape[1], device=total.device) < total[:, None]) & (best.values > -torch.inf)
    return torch.zeros_like(ranked[..., 0], dtype=torch.int64).scatter_add(1, best.indices % heads, taken.long())


@dataclass(frozen=True, kw_only=True)
class AdaKV(Wrapper):
    """Budgets of heads by the best scores of the layer, under the scores of ``base``.

    Attributes:
        alpha: part of the equal budget that every head keeps; 1 gives every head the same.
    """

    alpha: float = field(default=0.2, metadata={"help": "part of the equal budget that every head keeps, 0 to 1"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"adakv: alpha is a part of the budget, 0 to 1, not {self.alpha}")
        super().__post_init__()

    def head_budgets(self, view: CacheView, scores: Tensor, budgets: Tensor) -> Tensor | None:
        uneven = super().head_budgets(view, scores, budgets)
        budgets = budgets if uneven is None else uneven
        filled, fixed = view.positions >= 0, must_stay(self, view)
        kept = (filled & fixed).sum(-1)
        equal = (budgets - kept).clamp(min=0)
        total = equal.sum(1)
        ranked = scores.masked_fill(fixed | ~filled, -torch.inf).sort(dim=-1, descending=True).values
        best = _shares(ranked, total)
        floor = (self.alpha * equal.double() + (1 - self.alpha) * best.double() + 1e-9).long()
        sure = torch.arange(ranked.shape[2], device=ranked.device) < floor[..., None]
        return kept + _shares(ranked.masked_fill(sure & (ranked > -torch.inf), torch.inf), total)
