# SPDX-License-Identifier: Apache-2.0
"""The store behind every eviction policy: update, attend, observe, evict."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.budget import keep_counts, keep_limit
from ..attention.padded import PaddedCache
from ..call import AttentionCall, SecondReading, Site, Store
from ..errors import UserError
from ._evict import drop_outside_window, keep_best, warn_of_few
from ._policy import CachePolicy, why_not_fixed
from ._second_reading import Rereading
from ._tokens import Tokens
from ._view import CacheView, QueryWindow, received

__all__ = ["PolicyStore", "choose_storage", "view_of"]

_RECEIVED = "accumulated_attention"  # among the extras of each slot


class PolicyStore(Store):
    """What one layer remembers under a :class:`CachePolicy`. See ``manyheads.call.Store`` for the order of calls.

    Between forwards a layer is in ragged storage where its heads keep unequal numbers, where its policy has a codec,
    or where it is made for compiled decoding (``room``).

    Args:
        policy: what to keep.
        site: the place in the model.
        record: keep the last ``record`` queries and the evidence of the last forward, so that :meth:`fork` can hand
            them to other policies; and all tokens of a sliding-window layer, which a policy may choose among.
    """

    covers_past: ClassVar[bool] = True
    steps_ragged: ClassVar[bool] = False  # attend evicts at every step in ragged storage

    def __init__(self, policy: CachePolicy, site: Site, record: int = 0) -> None:
        super().__init__(site, record)
        self.policy = policy
        self.appends = policy.lossless and policy.budget == 1.0 and policy.codec is None and site.window is None
        self.reset()

    def reset(self) -> None:
        self.tokens = Tokens(self.policy.codec, self.policy.codec_window, self.room, self.policy.protect)
        self.state: dict[str, Tensor] = {}
        self._queries: QueryWindow | None = None
        self._evidence: CacheView | None = None
        self._waiting: CacheView | None = None  # until the other layers have run
        self._reading: slice | None = None  # what the forward under way reads again, and does not leave behind
        self._ragged = False  # heads or rows keep unequal numbers
        self._scaled = False  # the factors on encoded keys are found
        self._since = 0  # tokens since the last eviction
        self._forwards = 0

    @property
    def padded(self) -> PaddedCache | None:
        return self.tokens.padded

    @property
    def live(self) -> PaddedCache:
        """The slots, brought back from ragged storage."""
        self.tokens.unpack()
        return self.tokens.live

    @property
    def seen(self) -> int | Tensor:
        return self.tokens.seen

    @property
    def dropped(self) -> bool:
        """Whether slots no longer stand for the columns one by one."""
        return self.tokens.ragged is not None or (self.padded is not None and self.padded.index is not None)

    @property
    def places(self) -> Tensor | None:
        return self.live.columns() if self.dropped else None

    @property
    def why_not_fixed(self) -> str | None:
        return why_not_fixed(self.policy, self.site)

    @property
    def rows(self) -> int | None:
        return self.tokens.rows

    @property
    def real(self) -> Tensor | None:
        return self.tokens.real

    @property
    def keys(self) -> Tensor | None:
        return None if self.padded is None and self.tokens.ragged is None else self._copy.keys

    @property
    def values(self) -> Tensor | None:
        return None if self.padded is None and self.tokens.ragged is None else self._copy.values

    @property
    def _copy(self) -> PaddedCache:
        return self.tokens.live if self.tokens.ragged is None else self.tokens.ragged.unpack()

    @property
    def held(self) -> list[Tensor | None]:
        queries = [] if self._queries is None else [self._queries.q, self._queries.positions]
        return [*self.tokens.held, *queries, *self.state.values()]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next T tokens ``[B, Hs, T, d]``; return all slots, the new ones last, or a single new one alone."""
        if self._reading is not None:
            return torch.cat([self.live.keys, k], 2), torch.cat([self.live.values, v], 2)
        if self.second_reading is not None:
            why = "reads a prompt twice, and the second time did not come: call the model that manyheads.use was given"
            raise UserError(f"{self.policy.slug} {why}, not a part of it, nor one with an encoder")
        return self.tokens.update(k, v)

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Decode one token over ragged storage, ``[B, 1, H, d]``; None where slots are needed."""
        flat, policy = self.tokens.ragged, self.policy
        if flat is None or not self.tokens.takes(call):
            return None
        if flat.fixed:
            return self.tokens.decode(call)
        if policy.should_evict(self._forwards + 1, 1, self._since + 1):
            return None
        if policy.schedule != "prefill":
            if policy.gathers:
                return None
            if policy.window:
                mine = QueryWindow(call.q, flat.counts[:, None].clone())
                self._queries = mine if self._queries is None else self._queries.join(mine).last(policy.window)
        self._forwards += 1
        self._since += 1
        return self.tokens.decode(call)

    def mask(self, call: AttentionCall) -> AttentionCall:
        """Note which new columns hold tokens, and give the call the mask of its slots."""
        if self._reading is not None:
            if call.mask is not None and (more := call.k.shape[2] - call.mask.shape[-1]):  # of the new columns alone
                call = call.replace(mask=torch.nn.functional.pad(call.mask, (more, 0), value=True))
            return call
        if self.tokens.ragged is not None:
            call = call.replace(k=self.live.keys, v=self.live.values)
        slots, new = self.live, call.q.shape[2]
        if call.mask is not None:
            slots.mark(call.mask[:, :, :, -new:].any(2).any(1).expand(call.q.shape[0], -1))
        if slots.index is None and (slots.valid is None if call.mask is None else call.mask.shape[-1] == slots.size):
            return call
        if call.bias is not None:
            raise UserError(
                f"{self.policy.slug} cannot evict at {self.site.name}: numbers are added to the logits by cache "
                "column, a position bias or a mask of floats; use a boolean mask, a model with rotary positions"
            )
        if call.mask is None and slots.even and self.site.window is None:
            return call.replace(is_causal=new > 1)
        return call.replace(mask=slots.visible(call.mask, new, self.site.window is None), is_causal=False)

    def evict(self, call: AttentionCall) -> None:
        if self._reading is not None:
            if self._waiting is not None and isinstance(self.policy, Rereading):
                self.policy.reconstruct(call, self._reading, self.state)
            return
        slots, new, policy = self.live, call.q.shape[2], self.policy
        waits = self.prefilling and policy.waits  # for the rest of the prompt
        self._forwards += not waits
        self._since += new
        evicting = not waits and policy.should_evict(self._forwards, new, self._since)
        scoring = evicting or waits or policy.schedule != "prefill"  # now or later
        window = max(self.record, policy.window if scoring else 0)
        if window or (policy.gathers and scoring):
            latest = QueryWindow.of(call.q, slots)
            if window:
                self._queries = (latest if self._queries is None else self._queries.join(latest)).last(window)
            if scoring:
                _gather(self, call, latest)
        view = view_of(self, call)
        if self.tokens.codec is not None and not (waits or self._scaled or _stays_whole(self)):
            self.tokens.key_scale, self._scaled = policy.key_scale(view), True
        if evicting:
            self.compress(view)
            first = self._forwards == 1 and not self.prefilling
            if first and self.site.layer == min(self.site.peers, default=self.site.layer):
                warn_of_few(policy, self._limits(view.counts)[1], view.positions.shape[2])
        if self.record:
            earlier = {} if self._evidence is None else self._evidence.shared
            view.shared.update({name: x for name, x in earlier.items() if name.startswith("angle_")})
            replace(view, state=view.shared).angle_step()  # forks look at the latest forward only
            self._evidence = view
        if self._waiting is None:
            choose_storage(self, call.k, call.v)

    def fork(self, target: Store | None = None) -> Store:
        """As in :class:`Store`: exact for policies with ``dense_prefill``, refused once this store dropped a token."""
        if target is None:
            target = type(self)(self.policy, self.site)
            target.group = {self.site.layer or 0: target}
        return _fork(self, target) if isinstance(target, PolicyStore) else super().fork(target)

    def state_dict(self) -> dict[str, Any]:
        if self._waiting is not None:
            raise UserError(f"{self.policy.slug} has not evicted yet, not all layers have run: save it after a forward")
        queries = self._queries
        return {
            "tokens": self.tokens.state_dict(), "state": dict(self.state), "ragged": self._ragged,
            "queries": None if queries is None else {"q": queries.q, "positions": queries.positions},
            "since": self._since, "forwards": self._forwards, "scaled": self._scaled, "record": self.record,
            "room": self.room,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.record, self.room = state["record"], state["room"]
        self.reset()
        self.tokens.load_state_dict(state["tokens"])
        self.state, self._ragged = dict(state["state"]), state["ragged"]
        self._queries = None if state["queries"] is None else QueryWindow(**state["queries"])
        self._since, self._forwards, self._scaled = state["since"], state["forwards"], state["scaled"]

    def compress(self, view: CacheView, share: Tensor | float | None = None) -> None:
        """Drop all but the best-scored slots of each row and head.

        ``share`` is the factor of this layer on the equal budget; a policy whose layers share one budget waits for
        the last of them to give it.
        """
        slots, policy, self._since = self.live, self.policy, 0
        counts, limit = self._limits(view.counts)
        if limit < slots.seen:
            if policy.cross_layer and share is None:
                self._waiting = view
                if not policy.rereads:
                    _evict_all_layers(self)
                return
            self._ragged |= keep_best(policy, view, slots, counts, limit, 1.0 if share is None else share)
        if policy.waits and not self.record:  # nothing is scored again, or by the queries that come from here on
            self._queries = None
            if policy.schedule == "prefill":
                slots.extras.pop(_RECEIVED, None)
            if policy.needs_queries:
                self.state.clear()

    def _limits(self, counts: Tensor) -> tuple[Tensor, int]:
        """Slots that each row of ``counts [B]`` tokens may keep now, and the most that any row may."""
        budget, least, whole = self.policy.budget, self.policy.protected, self.policy.kept_whole
        return keep_counts(budget, counts, least, whole), keep_limit(budget, self.live.seen, least, whole)

    @property
    def second_reading(self) -> SecondReading | None:
        waits = self._waiting is not None and self.policy.rereads
        return functools.partial(_second_reading, self) if waits else None

    def reorder(self, rows: Tensor) -> None:
        self._evidence = None
        self.tokens.reorder(rows)
        self.state = {name: x[rows.to(x.device)] for name, x in self.state.items()}
        if self._queries is not None:
            self._queries = self._queries.reorder(rows)

    def crop(self, count: int) -> None:
        self._evidence = None
        if not count or (self.padded is None and self.tokens.ragged is None):
            return
        policy = self.policy
        if (self._queries is not None and policy.window) or policy.gathers:
            raise UserError(
                f"a cache of {policy.slug} cannot be cropped, what it gathered from queries cannot be taken back: "
                "generate without an assistant or prompt lookup"
            )
        self.tokens.crop(count)
        self._queries = None
        self._since = max(0, self._since - count)


def _second_reading(store: PolicyStore, ids: Tensor, encode: Callable[[str], list[int]]) -> Iterator[Tensor]:
    """As :attr:`PolicyStore.second_reading` says."""
    policy = store.policy
    assert isinstance(policy, Rereading)
    if (real := store.real) is not None and not bool(real.all()):
        raise UserError(f"{policy.slug} reads a prompt twice, which padded rows cannot: give one length")
    stores = [s for s in (store.group or {0: store}).values() if isinstance(s, PolicyStore)]
    try:
        for columns, piece in policy.second_reading(ids, encode):
            for each in stores:
                each._reading = columns
            yield piece
    finally:
        for each in stores:
            each._reading = None
    _evict_waiting(store)


def _fork(store: PolicyStore, target: PolicyStore) -> PolicyStore:
    """Make ``target``, which is empty, what the forwards of ``store`` would have made it."""
    evidence, slots = store._evidence, store.padded
    if evidence is None or slots is None or slots.index is not None:
        raise UserError("only a full cache made with record > 0 can be forked, before its rows are rearranged")
    policy = target.policy
    if policy.rereads:
        raise UserError(f"{policy.slug} reads the prompt twice: make a cache of its own")
    if policy.record > store.record:
        raise UserError(f"{policy.slug} needs the last {policy.record} queries; make the cache with that record")
    target.tokens.padded = slots.twin()
    target._forwards = store._forwards
    queries, rotary = evidence.queries, evidence.rotary
    partial = queries is not None and rotary is not None and rotary[0].shape[1] != queries.q.shape[2]
    if policy.needs_queries and partial:
        raise UserError(f"{policy.slug} can be forked from a prompt that was read in one forward only")
    call = AttentionCall(
        store.site, evidence.k[:, :, :0] if queries is None else queries.q, evidence.k, evidence.v, evidence.scale,
        softcap=evidence.softcap, sinks=evidence.sinks, rotary=evidence.rotary,
    )  # fmt: skip
    if queries is not None:
        if policy.window:
            target._queries = queries.last(policy.window)
        _gather(target, call, queries, evidence)
    view = view_of(target, call, evidence.shared)
    if target.tokens.codec is not None and not _stays_whole(target):
        target.tokens.key_scale, target._scaled = policy.key_scale(view), True
    target.compress(view)
    if target._waiting is None:
        choose_storage(target, call.k, call.v)
    return target


def _gather(store: PolicyStore, call: AttentionCall, latest: QueryWindow, source: CacheView | None = None) -> None:
    """Add the attention that the ``latest`` queries paid to each slot, and let the policy see them.

    ``source`` is what the forks of one cache share, None where there are none.
    """
    if store.policy.accumulated_attention:
        extras = store.live.extras
        if source is None:
            new = received(store.live, call, latest)
        else:
            new = source.once(_RECEIVED, lambda _: received(store.live, call, latest))
        extras[_RECEIVED] = extras[_RECEIVED] + new if _RECEIVED in extras else new
    if store.policy.needs_queries:
        store.policy.observe(call, latest, store.state)


def view_of(store: PolicyStore, call: AttentionCall, shared: dict[str, Tensor] | None = None) -> CacheView:
    """What the policy of ``store`` sees after ``call``; ``shared`` by all that look at the same tensors."""
    slots = store.live
    mass = slots.extras[_RECEIVED][..., 0] if _RECEIVED in slots.extras else None
    return CacheView(
        call.k, call.v, slots.positions(), slots.counts(), store._queries, call.scale, call.softcap, call.sinks,
        store.site, mass, call.rotary, store.state, {} if shared is None else shared,
        store.tokens.spans(call.k.shape[0], call.k.device),
    )  # fmt: skip


def _evict_all_layers(last: PolicyStore) -> None:
    """Evict in all layers of a cache, once the last of them has run."""
    policy = last.policy
    mine = [layer for layer in last.site.peers if policy.layers is None or layer in policy.layers]
    if not mine or last.site.layer == mine[-1]:
        _evict_waiting(last)


def _evict_waiting(last: PolicyStore) -> None:
    """Evict in all layers of the cache of ``last`` that wait for it."""
    policy = last.policy
    waiting = {
        n: (s, s._waiting)
        for n, s in sorted((last.group or {0: last}).items())
        if isinstance(s, PolicyStore) and s._waiting is not None
    }
    shares = policy.layer_budgets({n: view for n, (_, view) in waiting.items()})
    for n, (store, view) in waiting.items():
        store._waiting = None
        store.compress(view, shares[n])
        choose_storage(store, view.k, view.v)


def choose_storage(store: PolicyStore, k: Tensor, v: Tensor) -> None:
    """After a forward that used ``k, v``: drop what left the sliding window, or pack where that is smaller."""
    tokens, policy = store.tokens, store.policy
    if tokens.ragged is not None:
        return  # it is packed already
    slots = tokens.live
    if store.site.window is not None:
        if not store.record:  # a fork chooses among all tokens, as its policy would after a prompt
            drop_outside_window(slots, store.site.window)
        return
    if store.site.latent is not None or k.requires_grad or (store.prefilling and policy.waits):
        return
    if k.shape[1] != slots.keys.shape[1] or not k.shape[3] == v.shape[3] == slots.keys.shape[3]:
        return  # the cache holds something else than keys and values
    accrues = policy.accumulated_attention and policy.schedule != "prefill"  # only padded caches keep it
    ragged = store._ragged and (policy.schedule != "step" or store.steps_ragged) and not accrues
    if (tokens.codec is not None and not _stays_whole(store)) or (tokens.room and not store.prefilling) or ragged:
        tokens.pack()


def _stays_whole(store: PolicyStore) -> bool:
    """Whether the text is so short that it stays as it is; storage for compiled decoding is made at once."""
    return not store.room and store.live.seen <= store.policy.kept_whole
