# SPDX-License-Identifier: Apache-2.0
"""A cache of fixed size that chooses the token to evict before attention, by locality-sensitive hashing.

Liu et al., "HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-Sensitive Hashing", arXiv 2412.16187.
A vector is hashed to the signs of ``num_bits`` random projections, h(x) = [xR >= 0]. Two hashes differ in a bit with
probability angle(x, y) / pi, so the Hamming distance between the hash of a probe and those of the cached keys says
which key points furthest from the probe, and would get the least attention, without computing attention. That key's
slot is overwritten by the new token, and only then the model attends. The first ``num_global`` tokens and the last
``num_recent`` before the new one are never evicted. Every key/value head evicts for itself.

Paper and released code differ in the probe. ``probe="query"`` (paper) hashes the current query; with grouped queries
the distances of a group are summed (our choice: the paper does not say). ``probe="key"`` (released code) hashes the
current key. A prompt longer than the cache keeps its global and most recent tokens (released code's default): of what
lies between nothing is chosen, and on a long prompt read at once this is StreamingLLM. With ``prompt="hashed"`` (ours)
a prompt is read as decoding would: each of its tokens is hashed, evicts one and attends to what is left, in one forward
as in many. It needs a mask of T x N per key/value head; read long prompts in chunks.

Budget: the cache holds N slots per head, N = ``budget`` if that is a whole number, else
ceil(budget * (prompt + reserve)) fixed at the first forward; the released code reserves max_new_tokens there. While
decoding one slot more is allocated, the staging slot, which holds the new token until another slot is evicted.

Bits are packed eight to a byte (released code: one byte a bit): num_bits / 8 bytes per slot and head.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..attention import reference
from ..attention.bits import hamming, pack_signs
from ..attention.budget import keep_counts, keep_limit
from ..attention.padded import PaddedCache
from ..attention.protect import within
from ..call import AttentionCall, Site
from ..errors import UserError
from ._evict import drop_outside_window, keep_marked
from ._policy import Schedule
from ._store import PolicyStore
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["HashEvict"]

_UNBOUNDED = 2**62


@dataclass(frozen=True, kw_only=True)
class HashEvict(EvictionStrategy):
    """Overwrite the key whose hash is furthest from the probe's.

    Attributes:
        probe: what is hashed to find the token to evict, ``query`` (paper) or ``key`` (released code).
        prompt: of one longer than the cache, ``recent`` keeps the most recent tokens (released code), ``hashed`` evicts
            token by token.
        num_bits: random projections per hash.
        num_global: first tokens that are never evicted.
        num_recent: last tokens before the new one that are never evicted.
        reserve: tokens expected beyond the prompt, counted into a fractional budget.
        seed: of the projections; each layer draws its own, shared by its heads.
    """

    exact_chunks: ClassVar[bool] = True

    probe: Literal["query", "key"] = field(default="query", metadata={"help": "query (paper) or key (released code)"})
    prompt: Literal["recent", "hashed"] = field(
        default="recent", metadata={"help": "prompt longer than the cache: recent (released code), or hashed"}
    )
    num_bits: int = field(default=16, metadata={"help": "random projections per hash"})
    num_global: int = field(default=4, metadata={"help": "first tokens that are never evicted"})
    num_recent: int = field(default=10, metadata={"help": "last tokens that are never evicted"})
    reserve: int = field(default=0, metadata={"help": "tokens expected beyond the prompt, for a fractional budget"})
    seed: int = field(default=0, metadata={"help": "seed of the projections"})
    schedule: Schedule = field(default="step", metadata={"help": "always step"})

    def __post_init__(self) -> None:
        if self.schedule != "step":
            raise UserError("hashevict replaces a slot at every step: its schedule is step")
        if self.num_bits < 1 or self.reserve < 0 or self.num_global < 0 or self.num_recent < 0:
            raise UserError("hashevict: num_bits is at least 1; num_global, num_recent and reserve are not negative")
        super().__post_init__()

    @property
    def protected(self) -> int:
        return self.num_global + self.num_recent + 1  # and the slot that the new token takes

    @property
    def dense_prefill(self) -> bool:  # type: ignore[override]
        return self.prompt == "recent"

    def store(self, site: Site) -> "HashStore":
        return HashStore(self, site)

    def score(self, view: CacheView) -> Tensor:
        """A prompt that is not hashed keeps its global and most recent tokens."""
        return view.positions.float().masked_fill(view.positions < self.num_global, torch.inf)

    def projections(self, head_dim: int, layer: int, device: torch.device) -> Tensor:
        """R ``[d, num_bits]``, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        return torch.randn(head_dim, self.num_bits, generator=generator).to(device)


class HashStore(PolicyStore):
    """Slots with packed key hashes ``[B, Hkv, N, bytes]``, overwritten in place once the cache is full.

    While full and decoding, the slots have one place more than the capacity, at the end: there the new token waits
    (``update``), is attended to while the evicted token is masked (``mask``), and then moves into its slot (``evict``).
    """

    policy: HashEvict

    def reset(self) -> None:
        super().reset()
        self._projections: Tensor | None = None
        self._capacity = 0
        self._least = 0  # tokens up to which no row is full
        self._caps: Tensor | None = None  # [B], the capacity of each row
        self._replaced_by: Tensor | None = None  # [B, Hs, S], which of the T new tokens took a slot's place; T = none
        self._has_staging_slot = False

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.padded
        if self._has_staging_slot and slots is not None and slots.index is not None:
            if k.shape[2] == 1 and not k.requires_grad:
                slots.keys[:, :, -1:], slots.values[:, :, -1:], slots.index[:, :, -1] = k, v, slots.seen
                if slots.valid is not None:
                    slots.valid = torch.nn.functional.pad(slots.valid, (0, 1), value=True)
                slots.seen += 1
                return slots.keys, slots.values
            slots.narrow(0, self._capacity)
            self._has_staging_slot = False
        return super().update(k, v)

    def mask(self, call: AttentionCall) -> AttentionCall:
        """Choose what each of the T new tokens evicts, one after the other, and mask it from that token's query on."""
        hidden = super().mask(call)
        first = self._forwards == 0
        if first and self.policy.prompt == "recent":
            return hidden
        slots, new = self.live, call.q.shape[2]
        fresh = self._hash(call.k[:, :, -new:])
        if first:
            self._fix_capacity(slots.counts())
            slots.extras = {"hash": fresh}
        slots.extras["hash"][:, :, -new:] = fresh
        if slots.seen <= self._least:
            return hidden
        self._replaced_by = self._choose_evicted(self._hash(call.q) if self.policy.probe == "query" else fresh)
        alive = self._replaced_by[:, :, None, :] > torch.arange(new, device=call.q.device)[:, None]
        seen = hidden.allowed()
        if seen is not None:
            alive = (
                alive & seen if alive.shape[1] >= seen.shape[1] else seen & reference.repeat_kv(alive, seen.shape[1])
            )
        return hidden.replace(mask=alive, is_causal=False)

    def evict(self, call: AttentionCall) -> None:
        if self._forwards == 0:
            super().evict(call)
            return
        self._forwards += 1
        slots, new, replaced_by = self.live, call.q.shape[2], self._replaced_by
        self._replaced_by = None
        if replaced_by is not None and self._has_staging_slot:
            _move_in(slots, replaced_by)
        elif replaced_by is not None:
            _drop(self, replaced_by == new)
        if self.site.window is not None and not self._has_staging_slot:
            drop_outside_window(slots, self.site.window)

    def compress(self, view: CacheView, share: Tensor | float | None = None) -> None:
        """Fix the capacity, hash the prompt's keys, keep its global and most recent tokens or those not replaced."""
        slots = self.live
        if self.policy.prompt == "hashed":
            if self._replaced_by is not None:
                _drop(self, self._replaced_by == slots.size)
                self._replaced_by = None
            elif slots.seen > self._least:
                raise UserError("hashevict:prompt=hashed reads a prompt by itself: it is no fork of another cache")
            return
        self._fix_capacity(view.counts)
        slots.extras = {"hash": self._hash(view.k)}
        super().compress(view, share)

    def _fix_capacity(self, counts: Tensor) -> None:
        """Slots of each row and of the longest, from the tokens ``[B]`` of the prompt, which may come in chunks."""
        slots, budget = self.live, self.policy.budget
        rest = max(0, self.prompt - slots.seen)  # of the prompt; padding is in its first chunk
        if isinstance(budget, int) or budget == 1.0:
            self._capacity = budget if isinstance(budget, int) else _UNBOUNDED
            self._caps = torch.full_like(counts, self._capacity)
        else:
            least = self.policy.protected  # also of a prompt that is shorter: the capacity is fixed by it
            self._capacity = max(keep_limit(budget, slots.seen + rest + self.policy.reserve), least)
            self._caps = keep_counts(budget, counts + rest + self.policy.reserve).clamp(min=least)
        spans = self.tokens.spans(len(counts), counts.device)
        if spans is not None and self._capacity != _UNBOUNDED:
            held = spans.diff(dim=-1).sum((1, 2)) + self.policy.protected
            self._caps = self._caps.maximum(held)
            self._capacity, self._least = int(self._caps.max()), int(self._caps.min())
        else:
            self._least = self._capacity  # the longest row is the first to be full

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self._caps = None if self._caps is None else self._caps[rows.to(self._caps.device)]

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(), "capacity": self._capacity, "least": self._least, "caps": self._caps,
            "has_staging_slot": self._has_staging_slot,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._capacity, self._least, self._caps, self._has_staging_slot = (
            state[name] for name in ("capacity", "least", "caps", "has_staging_slot")
        )

    @property
    def held(self) -> list[Tensor | None]:
        return [*super().held, self._projections, self._caps]

    def _limits(self, counts: Tensor) -> tuple[Tensor, int]:
        return counts if self._caps is None else self._caps, self._least

    def _hash(self, x: Tensor) -> Tensor:
        if self._projections is None:
            self._projections = self.policy.projections(x.shape[-1], self.site.layer or 0, x.device)
        x = reference.widened(x)
        return pack_signs(x @ self._projections.to(x.dtype))

    def _choose_evicted(self, probes: Tensor) -> Tensor:
        """Which of the T new tokens takes each slot's place: ``probes [B, H | Hkv, T, bytes] -> [B, Hs, S]``."""
        slots, policy, new = self.live, self.policy, probes.shape[2]
        positions, (caps, _) = slots.positions(), self._limits(slots.counts())
        heads, size = positions.shape[1], positions.shape[2]
        hashes = reference.repeat_kv(slots.extras["hash"], probes.shape[1])
        alive, spans = positions >= 0, self.tokens.spans(positions.shape[0], positions.device)
        never = positions < policy.num_global
        if spans is not None:
            never = never | within(positions, spans)
        alive[..., size - new :] = False
        replaced_by = torch.full_like(positions, new)
        filling = max(0, min(new, int(caps.min()) - (size - new)))  # tokens that surely find an empty slot
        alive[..., size - new : size - new + filling] = positions[..., size - new : size - new + filling] >= 0
        for t in range(filling, new):
            distance = hamming(probes[:, :, t, None], hashes).unflatten(1, (heads, -1)).sum(2)
            mine = positions[..., size - new + t, None]  # also the number of tokens before it
            spared = never | (positions >= mine - policy.num_recent)
            age = slots.seen - positions  # among equals the oldest goes
            rank = torch.where(alive & ~spared, distance.long() * (2 * slots.seen) + age, -1)
            evicted = rank.argmax(-1, keepdim=True)
            full = (alive.sum(-1, keepdim=True) >= caps[:, None, None]) & (mine >= 0)
            goes = torch.zeros_like(alive).scatter(2, evicted, full)
            replaced_by = replaced_by.masked_fill(goes, t)
            alive = alive & ~goes
            alive[..., size - new + t] = mine[..., 0] >= 0
        return replaced_by


def _drop(store: HashStore, kept: Tensor) -> None:
    """Keep the slots ``kept [B, Hs, N]``, and make the place in which new tokens wait once all are taken."""
    slots = store.live
    kept = kept & (slots.columns() >= 0)
    keep_marked(slots, kept, store._capacity)
    if slots.size == store._capacity and not slots.keys.requires_grad:
        _add_staging_slot(slots)
        store._has_staging_slot = True


def _move_in(slots: PaddedCache, replaced_by: Tensor) -> None:
    """The token in the staging slot overwrites the evicted one, or an empty slot of a row that is not full."""
    assert slots.index is not None
    columns = slots.columns()
    place = ((replaced_by[..., :-1] == 0).int() * 2 + (columns[..., :-1] < 0).int()).argmax(-1, keepdim=True)
    arrived = columns[..., -1:] >= 0  # False where the new token is padding
    slots.index.scatter_(2, place, torch.where(arrived, slots.index[..., -1:], slots.index.gather(2, place)))
    slots.index[..., -1] = -1
    for x in (slots.keys, slots.values, slots.extras["hash"]):
        at = place.expand(-1, x.shape[1], -1)[..., None].expand(-1, -1, -1, x.shape[3])
        came = arrived.expand(-1, x.shape[1], -1)[..., None]
        x.scatter_(2, at, torch.where(came, x[:, :, -1:], x.gather(2, at)))


def _add_staging_slot(slots: PaddedCache) -> None:
    slots.keys, slots.values = (torch.cat([x, x[:, :, -1:]], 2) for x in (slots.keys, slots.values))
    assert slots.index is not None
    slots.index = torch.nn.functional.pad(slots.index, (0, 1), value=-1)
    hashes = slots.extras["hash"]
    slots.extras = {"hash": torch.cat([hashes, hashes[:, :, -1:]], 2)}
