# SPDX-License-Identifier: Apache-2.0
"""Fewer tokens, and back: which token becomes part of which, said once for merging, pooling and selecting.

A :class:`Grouping` says for each of T tokens which of M groups it belongs to, or that it belongs to none (padding, or
a token that is dropped). ``reduce`` makes a weighted mean of each group, ``restore`` gives every token what its group
has become. :func:`adjacent` and :func:`matched` make groupings; any other way to choose only has to give ``into``.

Groups stand in the order of the tokens that they are named after, so that what is reduced is still a sequence. Rows of
a batch hold tokens from column 0 on and may have different numbers of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from .reference import widened

__all__ = ["STEPS", "Choice", "Grouping", "adjacent", "matched"]

STEPS = 4096.0  # steps of a cosine that are told apart: equal tokens tie, however a product was rounded
Choice = Literal["similar", "random"]


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which group each token belongs to.

    Attributes:
        into: ``[B, T]`` number of a token's group, ``count`` for none.
        count: groups M of the row that has most.
    """

    into: Tensor
    count: int

    def totals(self, weights: Tensor) -> Tensor:
        """Sums over groups: ``[B, T] -> [B, M]``."""
        return weights.new_zeros(len(weights), self.count + 1).scatter_add(1, self.into, weights)[:, :-1]

    def reduce(self, x: Tensor, weights: Tensor) -> Tensor:
        """Means over groups ``[B, M, C]`` of ``x [B, T, C]`` with ``weights [B, T]`` of at least 0; 0 without any."""
        share = widened(weights)
        total = torch.cat([self.totals(share), share.new_ones(len(x), 1)], 1).gather(1, self.into)
        share = share / total.masked_fill(total == 0, 1.0)
        parts = widened(x) * share.masked_fill(self.into == self.count, 0.0)[..., None]
        sums = parts.new_zeros(len(x), self.count + 1, x.shape[2])
        return sums.scatter_add(1, self.into[..., None].expand_as(parts), parts)[:, :-1].to(x.dtype)

    def restore(self, y: Tensor) -> Tensor:
        """To every token what its group has: ``y [B, M, C] -> [B, T, C]``, 0 to tokens of none."""
        y = torch.cat([y, y.new_zeros(len(y), 1, y.shape[2])], 1)
        return y.gather(1, self.into[..., None].expand(*self.into.shape, y.shape[2]))

    def then(self, later: "Grouping") -> "Grouping":
        """Both, one after the other."""
        into = pad(later.into, (0, 1), value=later.count)
        return Grouping(into.gather(1, self.into), later.count)


def adjacent(real: Tensor, ratio: Tensor | int, count: int) -> Grouping:
    """Every ``ratio`` tokens that stand side by side are a group, the last one perhaps of fewer.

    Args:
        real: ``[B, T]``, tokens, which stand before all padding.
        ratio: of all rows, or ``[B]``.
        count: groups of the row that has most.
    """
    at = torch.arange(real.shape[1], device=real.device)
    each = ratio[:, None] if isinstance(ratio, Tensor) else ratio
    return Grouping((at // each).expand_as(real).masked_fill(~real, count), count)


def matched(metric: Tensor, real: Tensor, kept: Tensor, count: int, *, choose: Choice = "similar") -> Grouping:
    """Bipartite soft matching (ToMe, Bolya et al., arXiv 2210.09461).

    Tokens at even columns each look for the token at an odd column that is most like them by the cosine; those most
    like theirs join it, until ``kept`` tokens are left. Cosines that differ by less
    than a four-thousandth tie, and ties go to earlier columns. The choice has no gradient.

    Args:
        metric: ``[B, T, d]`` by which tokens are compared; in ToMe the mean of a layer's keys over heads.
        real: ``[B, T]``, tokens, which stand before all padding and never join it.
        kept: ``[B]``, tokens to keep, at least half of a row's; fewer join where there are fewer.
        count: of the row that keeps most.
        choose: ``random`` is a control: partners by column, whatever the tokens are.
    """
    if metric.shape[1] < 2:
        return adjacent(real, 1, count)
    a, b = (normalize(widened(x.detach()), dim=2) for x in (metric[:, ::2], metric[:, 1::2]))
    score = (a @ b.mT * STEPS).round()
    if choose == "random":
        at = torch.arange(metric.shape[1], dtype=torch.float64, device=score.device)
        noise = (12.9898 * at[::2, None] + 78.233 * at[1::2]).sin() * 43758.5453
        score = (noise - noise.floor()).to(score.dtype).expand_as(score)
    score = score.masked_fill(~real[:, None, 1::2], -torch.inf).masked_fill(~real[:, ::2, None], -torch.inf)
    best, partner = score.max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(a.shape[1], device=a.device).expand_as(order))
    joins = rank < (real.sum(1) - kept)[:, None]
    even = torch.zeros_like(real)
    even[:, ::2] = joins
    stays = real & ~even
    place = stays.long().cumsum(1) - 1
    target = torch.zeros_like(place)
    target[:, ::2] = place.gather(1, 2 * partner + 1)
    return Grouping(torch.where(even, target, place.masked_fill(~stays, count)), count)
