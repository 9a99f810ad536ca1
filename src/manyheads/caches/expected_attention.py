# SPDX-License-Identifier: Apache-2.0
"""Keep what future queries will attend to, as far as past queries tell.

Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
arXiv 2510.00636. Queries before rotary positions are close to a Gaussian. With mean mu and covariance S of those seen
so far, and R the rotation averaged over the next ``future`` positions, the expected unnormalised weight of a key is

    z_j = exp(scale * (R mu) . k_j + scale^2 / 2 * k_j^T R S R^T k_j)

and a token counts by what it would add to the output: score_j = (z_j / sum_i z_i + epsilon) * |v_j|, averaged over the
query heads of a group. The first ``sinks`` tokens stay, and are left out of the statistics and of the sum.

The released code (kvpress) computes the same from the hidden states of one prompt. Here the statistics run along with
every forward after which tokens may still be dropped (with ``schedule=prefill`` they go with the prompt, and the cache
holds its tokens alone), from the queries as attention got them, turned back by the model's own cosines and sines; the
rotation of later positions continues from the newest one by the angle between neighbours, as the longest forward showed
it (models whose frequencies change with the length are followed no further). As in the code the average rotation is
applied to the covariance as if it were one rotation. A cap on the logits and learned sinks do not enter.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference, rope
from ..errors import UserError
from ._query_statistics import QueryStatistics
from ._view import CacheView

__all__ = ["ExpectedAttention"]


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(QueryStatistics):
    """Tokens with the largest expected weight, times the norm of their value.

    Attributes:
        future: positions over which the rotation is averaged.
        use_covariance: with the second-order term.
        use_vnorm: times the norm of the value.
        epsilon: added to the weight before that.
    """

    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped, nor counted"})
    future: int = field(default=512, metadata={"help": "next positions over which the rotation is averaged"})
    use_covariance: bool = field(default=True, metadata={"help": "with the covariance of the queries"})
    use_vnorm: bool = field(default=True, metadata={"help": "times the norm of the value"})
    epsilon: float = field(default=0.0, metadata={"help": "added to the expected weight before the norm"})

    def __post_init__(self) -> None:
        if self.future < 1 or self.epsilon < 0:
            raise UserError("expected_attention: future is at least 1 and epsilon not negative")
        super().__post_init__()

    @property
    def gathers_covariance(self) -> bool:
        return self.use_covariance

    def score(self, view: CacheView) -> Tensor:
        state, groups = view.state, view.k.shape[1]
        newest = state["cos"][:, None], state["sin"][:, None]
        cos, sin = rope.mean_rotation(newest, state["angle_step"], self.future)
        # (R mu) . k = mu . (R^T k), and likewise for the covariance: keys are turned once, not the statistics.
        k = rope.rotate(reference.widened(view.k), (cos, -sin))
        mean = state["query_mean"].unflatten(1, (groups, -1))  # [B, Hkv, G, d]
        x = mean @ k.transpose(-1, -2) * view.scale
        if self.use_covariance:
            scatter = state["query_scatter"].unflatten(1, (groups, -1))
            covariance = scatter / state["query_count"].clamp(min=1)[:, None, None, None, None]
            second = [((k @ covariance[:, :, g]) * k).sum(-1) for g in range(mean.shape[2])]
            x = x + torch.stack(second, 2) * (view.scale**2 / 2)
        counted = reference.repeat_kv(view.positions[:, :, None] >= self.sinks, groups)
        scores = reference.softmax(x, counted).mean(2)
        return (
            (scores + self.epsilon) * torch.linalg.vector_norm(reference.widened(view.v), dim=-1)
            if self.use_vnorm
            else scores
        )
