# SPDX-License-Identifier: Apache-2.0
"""The store behind every eviction policy: append, attend, observe, evict."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.budget import keep_counts, keep_limit
from ..attention.slots import Slots, nbytes
from ..call import AttentionCall, Site
from ..errors import UserError

if TYPE_CHECKING:
    from ._policy import CachePolicy

__all__ = ["PolicyStore", "QueryWindow", "View"]


@dataclass(frozen=True, slots=True)
class QueryWindow:
    """The last queries of each row after rotary positions: ``q [B, H, W, d]`` at ``positions [B, W]``, -1 = none."""

    q: Tensor
    positions: Tensor

    @classmethod
    def of(cls, q: Tensor, slots: Slots) -> "QueryWindow":
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

    def select(self, rows: Tensor) -> "QueryWindow":
        rows = rows.to(self.q.device)
        return QueryWindow(self.q[rows], self.positions[rows])


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees of one layer. N slots, Hkv key/value heads, Hs stored heads (Hkv, or 1 for latent caches).

    Attributes:
        k, v: ``[B, Hkv, N, d]`` as attention used them.
        positions: ``[B, Hs, N]`` position within the row, padding not counted; -1 = empty slot or padding.
        counts: ``[B]`` tokens seen per row.
        queries: the last W queries of each row, None unless the policy asks for a window.
        scale, softcap, sinks: of the attention call.
        site: the place in the model.
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


def leave_window(slots: Slots, window: int) -> None:
    """Drop what no later query of a sliding-window layer can see: the same slots that an ordinary cache drops."""
    reach = window - 1
    if slots.size <= reach:
        return
    if slots.index is None:
        slots.narrow(slots.size - reach, reach)
    else:
        gone = slots.index <= slots.seen - window
        order = gone.int().argsort(dim=-1, stable=True)[..., :reach]
        slots.keep(order, ~gone.gather(2, order))


class PolicyStore:
    """What one layer remembers under a :class:`CachePolicy`. See ``manyheads.call.Store`` for the order of calls.

    Args:
        policy: what to keep.
        site: the place in the model.
        record: keep the last ``record`` queries and the evidence of the last forward, so that :meth:`fork` can hand
            them to other policies.
    """

    def __init__(self, policy: "CachePolicy", site: Site, record: int = 0) -> None:
        self.policy = policy
        self.site = site
        self.record = record
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.slots: Slots | None = None
        self._queries: QueryWindow | None = None
        self._evidence: View | None = None
        self._since = 0  # tokens since the last eviction
        self._forwards = 0

    @property
    def seen(self) -> int:
        return 0 if self.slots is None else self.slots.seen

    @property
    def keys(self) -> Tensor | None:
        return None if self.slots is None else self.slots.keys

    @property
    def values(self) -> Tensor | None:
        return None if self.slots is None else self.slots.values

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next T tokens ``[B, Hs, T, d]``; return all slots, the new ones last."""
        if self.slots is None:
            self.slots = Slots.empty(k, v)
        self.slots.append(k, v)
        return self.slots.keys, self.slots.values

    def admit(self, call: AttentionCall) -> AttentionCall:
        """Note which new columns hold tokens, and give the call the mask of its slots."""
        slots, new = self._slots(), call.q.shape[2]
        if call.mask is not None:
            slots.mark(call.mask[:, :, :, -new:].any(2).any(1).expand(call.q.shape[0], -1))
        if slots.index is None:
            return call
        if call.bias is not None:
            raise UserError(
                f"{self.policy.slug} cannot evict at {self.site.name}: the model adds a position bias computed from "
                "cache columns; use a model with rotary or absolute positions"
            )
        return call.replace(mask=slots.visible(call.mask, new), is_causal=False)

    def settle(self, call: AttentionCall) -> None:
        """Observe the attention call, and evict if the schedule says so."""
        slots, new = self._slots(), call.q.shape[2]
        self._forwards += 1
        self._since += new
        due = self.policy.due(self._forwards, new, self._since)
        window = max(self.record, self.policy.window if due or self.policy.schedule != "prefill" else 0)
        if window:
            latest = QueryWindow.of(call.q, slots)
            self._queries = (latest if self._queries is None else self._queries.join(latest)).last(window)
        if due or self.record:
            view = View(
                call.k, call.v, slots.positions(), slots.counts(), self._queries, call.scale, call.softcap, call.sinks,
                self.site,
            )  # fmt: skip
            if due:
                self.compress(view)
            if self.record:
                self._evidence = view
        if self.site.window is not None:
            leave_window(slots, self.site.window)

    def fork(self, policy: "CachePolicy") -> "PolicyStore":
        """The store that ``policy`` would have after the same forwards, over the same tensors; self is unchanged.

        Exact for policies with ``dense_prefill``, as long as this store has dropped nothing.
        """
        if self._evidence is None or self.slots is None or self.slots.index is not None:
            raise UserError("only a full cache made with record > 0 can be forked, before its rows are rearranged")
        if policy.window > self.record:
            raise UserError(f"{policy.slug} needs the last {policy.window} queries; make the cache with that record")
        twin = policy.store(self.site)
        twin.slots = replace(self.slots)
        twin._forwards = self._forwards
        queries = self._evidence.queries
        if queries is not None and policy.window:
            twin._queries = queries.last(policy.window)
        twin.compress(replace(self._evidence, queries=twin._queries))
        return twin

    def compress(self, view: View) -> None:
        """Drop all but the best-scored slots of each row and head."""
        slots, policy = self._slots(), self.policy
        self._since = 0
        if policy.schedule == "prefill" and not self.record:
            self._queries = None
        counts, limit = self._limits(view.counts)
        if limit >= slots.seen:
            return
        policy.check(limit)
        scores = policy.score(view).float()
        heads = slots.keys.shape[1]
        if scores.shape[1] != heads:
            scores = scores.unflatten(1, (heads, -1)).mean(2)
        budgets = counts[:, None].expand(-1, heads)
        uneven = policy.allocate(view, scores, budgets)
        if uneven is not None:
            budgets, limit = uneven, int(uneven.max())
        scores = scores.masked_fill(policy.protect(view), torch.inf).masked_fill(view.positions < 0, -torch.inf)
        # Flipped, so that the stable sort puts the newer of two equal slots first.
        order = slots.size - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
        order = order[..., :limit]
        kept = torch.arange(order.shape[2], device=order.device) < budgets[..., None]
        kept = kept & (view.positions.gather(2, order) >= 0)
        rank = torch.where(kept, order, slots.size).argsort(dim=-1, stable=True)
        order, kept = order.gather(2, rank), kept.gather(2, rank)
        stays = torch.zeros_like(scores, dtype=torch.bool).scatter(2, order, kept)
        merged = policy.merge(view, stays)
        if merged is not None:
            slots.keys, slots.values = merged
        slots.keep(order, kept)

    def _limits(self, counts: Tensor) -> tuple[Tensor, int]:
        """Slots that each row of ``counts [B]`` tokens may keep now, and the most that any row may."""
        return keep_counts(self.policy.budget, counts), keep_limit(self.policy.budget, self.seen)

    def _slots(self) -> Slots:
        if self.slots is None:
            raise RuntimeError(f"{self.site.name}: attention ran before its cache was written")
        return self.slots

    def select(self, rows: Tensor) -> None:
        """Take batch rows ``[B']`` of everything remembered."""
        self._evidence = None
        if self.slots is not None:
            self.slots.select(rows)
        if self._queries is not None:
            self._queries = self._queries.select(rows)

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens; refused once something was dropped."""
        self._evidence = None
        if not count or self.slots is None:
            return
        if self._queries is not None and self.policy.window:
            raise UserError(
                f"a cache of {self.policy.slug} cannot be cropped, the queries before its window are gone: generate "
                "without an assistant or prompt lookup"
            )
        self.slots.crop(count)
        self._queries = None
        self._since = max(0, self._since - count)

    def nbytes(self) -> int:
        """Bytes that this layer really holds: storages of keys, values, remembered queries and bookkeeping."""
        return nbytes(*self._held())

    def _held(self) -> list[Tensor | None]:
        """Every tensor kept between steps."""
        slots, queries = self.slots, self._queries
        kept = [] if slots is None else [slots.keys, slots.values, slots.index, slots.valid, slots.extra]
        return kept if queries is None else [*kept, queries.q, queries.positions]
