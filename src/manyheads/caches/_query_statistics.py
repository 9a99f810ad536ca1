# SPDX-License-Identifier: Apache-2.0
"""Statistics of the queries that a layer has had, before rotary positions, which run along with every forward."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import reference, rope
from ..call import AttentionCall
from ..errors import UserError
from ._strategy import EvictionStrategy
from ._view import QueryWindow

__all__ = ["QueryStatistics"]

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
class QueryStatistics(EvictionStrategy):
    """Base of strategies that score by the mean of the queries and more of their distribution.

    In ``view.state`` they find ``query_count [B]``, ``query_mean [B, H, d]``, ``query_scatter [B, H, d, d]`` (centred
    sum of squares) and ``query_size [B, H, d]`` (mean length of the pairs of channels that turn together, at both
    channels), and the rotation of the newest token: ``cos``, ``sin`` ``[B, r]`` and ``angle_step [B, r / 2]``. The
    first ``sinks`` tokens are not counted.
    """

    needs_queries: ClassVar[bool] = True

    @property
    def gathers_covariance(self) -> bool:
        """Whether ``query_scatter`` is gathered."""
        return False

    @property
    def gathers_sizes(self) -> bool:
        """Whether ``query_size`` is gathered."""
        return False

    def observe(self, call: AttentionCall, queries: QueryWindow, state: dict[str, Tensor]) -> None:
        """Add the queries of a forward to mean and scatter, and note the rotation of the newest token."""
        rotary, (batch, heads, new, dim) = call.rotary, queries.q.shape
        if rotary is None or not (state or _half_split(call)):
            raise UserError(
                f"{self.slug} needs the rotary positions of {call.site.name} in half-split layout, which the "
                "model does not pass on; choose keydiff, knorm or snapkv"
            )
        cos, sin = (reference.widened(x).expand(batch, -1, -1) for x in rotary)
        if not state:
            state["query_count"] = torch.zeros(batch, device=cos.device)
            state["query_mean"] = torch.zeros(batch, heads, dim, device=cos.device)
            if self.gathers_covariance:
                state["query_scatter"] = torch.zeros(batch, heads, dim, dim, device=cos.device)
            if self.gathers_sizes:
                state["query_size"] = torch.zeros(batch, heads, dim, device=cos.device)
            state["cos"], state["sin"] = torch.ones_like(cos[:, 0]), torch.zeros_like(sin[:, 0])
            state["newest"] = torch.full((batch,), _NOWHERE, device=cos.device)
            state["angle_step"] = torch.zeros_like(cos[:, 0, ::2])
            state["angle_span"] = torch.zeros_like(state["newest"])
        for start in range(0, new, _BLOCK):
            cut = slice(start, start + _BLOCK)
            q = rope.unrotate(reference.widened(queries.q[:, :, cut].detach()), (cos[:, cut], sin[:, cut]))
            self._gather(q, (queries.positions[:, cut] >= self.sinks)[:, None, :, None], state, cos.shape[-1])
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

    def _gather(self, q: Tensor, counted: Tensor, state: dict[str, Tensor], width: int) -> None:
        """Merge queries ``[B, H, T, d]`` where ``counted [B, 1, T, 1]`` into what is gathered."""
        count = counted.sum((1, 2, 3)).float()
        total = state["query_count"] + count
        mean = q.masked_fill(~counted, 0.0).sum(2) / count.clamp(min=1)[:, None, None]
        apart = mean - state["query_mean"]
        part = (count / total.clamp(min=1))[:, None, None]
        if self.gathers_covariance:
            centred = (q - mean[:, :, None]).masked_fill(~counted, 0.0)
            between = (part * state["query_count"][:, None, None] * apart)[..., None] * apart[:, :, None]
            state["query_scatter"] = state["query_scatter"] + centred.transpose(-1, -2) @ centred + between
        if self.gathers_sizes:
            size = rope.pair_norms(q, width).masked_fill(~counted, 0.0).sum(2) / count.clamp(min=1)[:, None, None]
            state["query_size"] = state["query_size"] + part * (size - state["query_size"])
        state["query_mean"] = state["query_mean"] + part * apart
        state["query_count"] = total
