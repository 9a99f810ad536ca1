# SPDX-License-Identifier: Apache-2.0
"""Keep the tokens outside the range of those that follow.

Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arXiv 2504.04704.
Behind the sinks, keys and values are cut into partitions of ``lag_size`` tokens. Each channel of a partition is scaled
by its least and largest value in the next partition, so that what the two have in common lies within [0, 1]; a token
whose channels then spread widely is new to its neighbourhood:

    x'_i = (x_i - min_next) / (max_next - min_next)           per channel
    score_i = softmax_i(std(k'_i)) + softmax_i(std(v'_i))     std over channels, softmax over the partition

The best of each partition stay, the same share of every partition. The last whole partition has no reference: it and
what follows it stay as they are. No query and no attention weight is needed.

Differs from the paper: the budget is the total per head, so the partitions give up what the sinks and the tail do not,
and a tail that is itself over the budget loses its oldest tokens. Partitions are made of the tokens held, so that under
a repeated schedule a token can be judged again; the released code never touches a compressed partition again, and its
cache grows. A channel that is constant in the reference, up to rounding, says nothing and counts as 0, where the code
divides by 0. Defaults: the 16 sinks of the released code, the lag of 128 of its example and of kvpress (its class says
1,024).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference
from ..errors import UserError
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["LagKV"]

_ROUNDING = 1e-5  # differences up to this part of the largest channel are rounding: the same token again


def _novelty(x: Tensor) -> Tensor:
    """Spread of tokens relative to the next partition: ``[B, H, P, L, d] -> [B, H, P - 1, L]``, sum over L 1."""
    low, high = x[:, :, 1:].amin(3, keepdim=True), x[:, :, 1:].amax(3, keepdim=True)
    varies = high - low > _ROUNDING * torch.maximum(high.abs(), low.abs()).amax(-1, keepdim=True)
    relative = torch.where(varies, (x[:, :, :-1] - low) / (high - low), 0.0)
    return relative.std(-1).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class LagKV(EvictionStrategy):
    """Tokens whose keys and values spread widest relative to the next ``lag_size`` tokens.

    Attributes:
        lag_size: tokens per partition.
    """

    sinks: int = field(default=16, metadata={"help": "first tokens that are never dropped"})
    lag_size: int = field(default=128, metadata={"help": "tokens per partition"})

    def __post_init__(self) -> None:
        if self.lag_size < 1:
            raise UserError("lagkv: lag_size is at least 1")
        super().__post_init__()

    def score(self, view: CacheView) -> Tensor:
        lag, heads, size = self.lag_size, view.k.shape[1], view.k.shape[2]
        # In the order of the row from the first token after the sinks on; sinks and empty slots last.
        late = view.positions.masked_fill(view.positions < self.sinks, torch.iinfo(torch.int64).max)
        order = reference.repeat_kv(late.argsort(dim=-1, stable=True)[..., None], heads)
        rank = torch.full(order.shape[:3], torch.inf, device=view.k.device)  # the tail is above any partition
        count = size // lag
        if count > 1:
            body = order[:, :, : count * lag]
            novelty = sum(
                _novelty(reference.widened(x).gather(2, body.expand(-1, -1, -1, x.shape[3])).unflatten(2, (count, lag)))
                for x in (view.k, view.v)
            )
            assert isinstance(novelty, Tensor)
            inside = novelty.argsort(dim=-1, stable=True).argsort(-1).flatten(2).float()  # rank in the partition
            whole = (view.positions >= self.sinks).sum(-1, keepdim=True) // lag  # partitions of this row and head
            judged = torch.arange(inside.shape[2], device=view.k.device) // lag < whole - 1
            judged = reference.repeat_kv(judged[..., None], heads)[..., 0]
            rank[:, :, : inside.shape[2]] = inside.masked_fill(~judged, torch.inf)
        # The same share of every partition: by rank, and of equal ranks the newer first.
        scores = rank.argsort(dim=-1, stable=True).argsort(-1).float()
        return torch.empty_like(scores).scatter(2, order[..., 0], scores)
