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
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import reference, rope
from ..call import AttentionCall
from ..errors import UserError
from ._strategy import EvictionStrategy
from ._view import CacheView, QueryWindow

__all__ = ["ExpectedAttention"]

_BLOCK = 4096  # queries turned back at once
_NOWHERE = -(2**40)  # position of padding: next to none


def _half_split(call: AttentionCall) -> bool:
    """Whether cosines ``[B, T, r]`` come twice over, as they do for pairs (i, i + r/2) of the first r channels.

    Where keys are wider than values and not all of them turn (MLA), the last channels may be the ones that do.
    """
    if call.rotary is None or call.site.latent is not None or call.rotary[0].ndim != 3:
        return False
    cos, dim = call.rotary[0], call.k.shape[-1]
    known = cos.shape[-1] == dim or (cos.shape[-1] < dim and dim == call.v.shape[-1])
    return known and torch.equal(*cos.chunk(2, -1))


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(EvictionStrategy):
    """Tokens with the largest expected weight, times the norm of their value.

    Attributes:
        future: positions over which the rotation is averaged.
        use_covariance: with the second-order term.
        use_vnorm: times the norm of the value.
        epsilon: added to the weight before that.
    """

    needs_queries: ClassVar[bool] = True

    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped, nor counted"})
    future: int = field(default=512, metadata={"help": "next positions over which the rotation is averaged"})
    use_covariance: bool = field(default=True, metadata={"help": "with the covariance of the queries"})
    use_vnorm: bool = field(default=True, metadata={"help": "times the norm of the value"})
    epsilon: float = field(default=0.0, metadata={"help": "added to the expected weight before the norm"})

    def __post_init__(self) -> None:
        if self.future < 1 or self.epsilon < 0:
            raise UserError("expected_attention: future is at least 1 and epsilon not negative")
        super().__post_init__()

    def observe(self, call: AttentionCall, queries: QueryWindow, state: dict[str, Tensor]) -> None:
        """Add the queries of a forward to mean and scatter, and note the rotation of the newest token."""
        rotary, (batch, heads, new, dim) = call.rotary, queries.q.shape
        if rotary is None or not (state or _half_split(call)):
            raise UserError(
                f"expected_attention needs the rotary positions of {call.site.name} in half-split layout, which the "
                "model does not pass on; choose keydiff, knorm or snapkv"
            )
        cos, sin = (reference.widened(x).expand(batch, -1, -1) for x in rotary)
        if not state:
            state["query_count"] = torch.zeros(batch, device=cos.device)
            state["query_mean"] = torch.zeros(batch, heads, dim, device=cos.device)
            if self.use_covariance:
                state["query_scatter"] = torch.zeros(batch, heads, dim, dim, device=cos.device)
            state["cos"], state["sin"] = torch.ones_like(cos[:, 0]), torch.zeros_like(sin[:, 0])
            state["newest"] = torch.full((batch,), _NOWHERE, device=cos.device)
            state["angle_step"] = torch.zeros_like(cos[:, 0, ::2])
            state["angle_span"] = torch.zeros_like(state["newest"])
        for start in range(0, new, _BLOCK):
            cut = slice(start, start + _BLOCK)
            q = rope.unrotate(reference.widened(queries.q[:, :, cut].detach()), (cos[:, cut], sin[:, cut]))
            self._gather(q, (queries.positions[:, cut] >= self.sinks)[:, None, :, None], state)
        self._follow(cos, sin, queries.positions, state)

    def _follow(self, cos: Tensor, sin: Tensor, positions: Tensor, state: dict[str, Tensor]) -> None:
        """Note the rotation of each row's newest token, and the angle per position where this forward shows it best."""
        cos, sin = torch.cat([state["cos"][:, None], cos], 1), torch.cat([state["sin"][:, None], sin], 1)
        positions = torch.cat([state["newest"][:, None], positions.masked_fill(positions < 0, _NOWHERE)], 1)
        step, span = rope.angle_step((cos, sin), positions), (positions >= 0).sum(1)
        better = (span > state["angle_span"]) & (step != 0).any(1)
        state["angle_step"] = torch.where(better[:, None], step, state["angle_step"])
        state["angle_span"] = torch.where(better, span, state["angle_span"])
        state["newest"], at = positions.max(1)
        state["cos"], state["sin"] = (x[torch.arange(len(at), device=at.device), at] for x in (cos, sin))

    def _gather(self, q: Tensor, counted: Tensor, state: dict[str, Tensor]) -> None:
        """Merge queries ``[B, H, T, d]`` where ``counted [B, 1, T, 1]`` into count, mean and sum of squares."""
        count = counted.sum((1, 2, 3)).float()
        total = state["query_count"] + count
        mean = q.masked_fill(~counted, 0.0).sum(2) / count.clamp(min=1)[:, None, None]
        apart = mean - state["query_mean"]
        part = (count / total.clamp(min=1))[:, None, None]
        if self.use_covariance:
            centred = (q - mean[:, :, None]).masked_fill(~counted, 0.0)
            between = (part * state["query_count"][:, None, None] * apart)[..., None] * apart[:, :, None]
            state["query_scatter"] = state["query_scatter"] + centred.transpose(-1, -2) @ centred + between
        state["query_mean"] = state["query_mean"] + part * apart
        state["query_count"] = total

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
