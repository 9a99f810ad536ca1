# SPDX-License-Identifier: Apache-2.0
"""What a policy sees of one layer when it decides what stays."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import rope
from ..attention.accumulated_attention import accumulated_attention
from ..attention.padded import PaddedCache
from ..call import AttentionCall, Site

__all__ = ["CacheView", "QueryWindow", "received"]


@dataclass(frozen=True, slots=True)
class QueryWindow:
    """The last queries of each row after rotary positions: ``q [B, H, W, d]`` at ``positions [B, W]``, -1 = none."""

    q: Tensor
    positions: Tensor

    @classmethod
    def of(cls, q: Tensor, slots: PaddedCache) -> "QueryWindow":
        """The queries ``[B, H, T, d]`` of the last T columns of ``slots``."""
        new = q.shape[2]
        if slots.valid is None:
            return cls(q, torch.arange(slots.seen - new, slots.seen, device=q.device).expand(q.shape[0], -1))
        rank = slots.valid.long().cumsum(1) - 1
        return cls(q, torch.where(slots.valid, rank, -1)[:, -new:])

    def join(self, later: "QueryWindow") -> "QueryWindow":
        return QueryWindow(torch.cat([self.q, later.q], 2), torch.cat([self.positions, later.positions], 1))

    def last(self, window: int) -> "QueryWindow":
        """The ``window`` last queries of each row by position: the rows of a padded batch end apart."""
        if self.positions.shape[1] <= window:
            return self
        at = self.positions.topk(window, 1).indices.sort(1).values
        q = self.q.gather(2, at[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3]))
        return QueryWindow(q, self.positions.gather(1, at))

    def reorder(self, rows: Tensor) -> "QueryWindow":
        rows = rows.to(self.q.device)
        return QueryWindow(self.q[rows], self.positions[rows])


@dataclass(frozen=True, slots=True)
class CacheView:
    """What a policy sees of one layer. N slots, Hkv key/value heads, Hs stored heads (Hkv, or 1 for latent caches).

    Attributes:
        k, v: ``[B, Hkv, N, d]`` as attention used them.
        positions: ``[B, Hs, N]`` position within the row, padding not counted; -1 = empty slot or padding.
        counts: ``[B]`` tokens seen per row.
        queries: the last W queries of each row, None unless the policy asks for a window.
        scale, softcap, sinks: of the attention call.
        site: the place in the model.
        mass: attention that each slot received since it came, summed over queries and over the query heads of its
            group, ``[B, Hs, N]``, float32 or wider; None unless the policy asks for it.
        rotary: cosines and sines ``[B, T, rotary_dim]`` of the latest forward, None where the model passes none on.
        state: what the policy wrote here at earlier evictions of this layer; tensors with the batch first.
        spans: ``[B, n, 2]`` starts and stops of what the user protects, by position; None for nothing.
        shared: what was computed once for all views of the same tensors, see :meth:`once`.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    counts: Tensor
    queries: QueryWindow | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    site: Site
    accumulated_attention: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    spans: Tensor | None = None

    def once(self, name: str, make: Callable[["CacheView"], Tensor]) -> Tensor:
        """``make(self)``, computed once for all caches that are forked from one: it may not depend on a budget."""
        if name not in self.shared:
            self.shared[name] = make(self)
        return self.shared[name]

    def angle_step(self) -> Tensor | None:
        """Angle per position of each rotary pair ``[B, r / 2]``, as the longest forward showed it; None where unknown.

        Noted in ``state``.
        """
        if self.shared is not self.state and "angle_step" in self.shared:  # the cache that this one is a fork of knows
            self.state.update({name: self.shared[name] for name in ("angle_step", "angle_span")})
            return self.shared["angle_step"]
        known = self.state if "angle_step" in self.state else self.shared
        if self.rotary is None or self.rotary[0].shape[1] < 2:
            return known.get("angle_step")
        cos, sin = (x.expand(self.positions.shape[0], -1, -1) for x in self.rotary)
        at = self.positions[:, 0, -cos.shape[1] :]
        step, span = rope.angle_step((cos, sin), at), (at >= 0).sum(1)
        if "angle_step" in known:
            longer = span > known["angle_span"]
            step, span = torch.where(longer[:, None], step, known["angle_step"]), span.maximum(known["angle_span"])
        self.state["angle_step"], self.state["angle_span"] = step, span
        return step


def received(slots: PaddedCache, call: AttentionCall, queries: QueryWindow) -> Tensor:
    """Attention that each slot received from ``queries``, ``[B, Hs, N, 1]``."""
    positions = slots.positions()
    if call.mask is not None and call.mask.shape[-1] == slots.size:  # no query may have seen a slot at all
        seen = call.mask.any(2)
        seen = seen if seen.shape[1] in (1, positions.shape[1]) else seen.unflatten(1, (positions.shape[1], -1)).any(2)
        positions = positions.masked_fill(~seen, -1)
    by_head = accumulated_attention(
        queries.q, call.k, queries.positions, positions, scale=call.scale, softcap=call.softcap,
        sinks=call.sinks, causal=call.mask is None and slots.valid is None and slots.even,
    )  # fmt: skip
    stored: Tensor = by_head.unflatten(1, (slots.keys.shape[1], -1)).sum(2)
    return stored[..., None]
