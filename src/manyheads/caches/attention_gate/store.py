# SPDX-License-Identifier: Apache-2.0
"""What a gated layer remembers: the keys and values that its gate kept, in ragged storage.

A token that the gate drops is hidden from every later query of its own forward and not stored: what is held between
forwards is what is kept. A gate looks back at all tokens, so where it goes on after the prompt its own keys and values,
``2 H' d'`` numbers a token and layer, are held too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...attention import reference
from ...attention.protect import within
from ...call import AttentionCall, Site
from .._evict import keep_marked
from .._store import PolicyStore, choose_storage

if TYPE_CHECKING:
    from . import AttentionGate

__all__ = ["GateStore"]

_KEYS, _VALUES = "gate_keys", "gate_values"  # in the state, while the gate looks back


class GateStore(PolicyStore):
    """The cache of one layer under its gate."""

    steps_ragged: ClassVar[bool] = True

    policy: AttentionGate

    def __init__(self, policy: AttentionGate, site: Site, record: int = 0) -> None:
        super().__init__(policy, site, record)

    def reset(self) -> None:
        super().reset()
        self._kept: Tensor | None = None  # [B, Hs, T], of the forward at hand; None for all

    @property
    def why_not_fixed(self) -> str | None:
        if self.policy.schedule != "prefill":
            return f"the gates of {self.policy.spec} go on after the prompt, which cannot be compiled; leave room away"
        return super().why_not_fixed

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Decode a token over ragged storage; it sees itself, and stays where the gate keeps it."""
        flat, policy = self.tokens.ragged, self.policy
        if policy.schedule == "prefill":
            return super().attend(call)
        if flat is None or not self.tokens.takes(call):
            return None
        came = torch.ones_like(flat.counts, dtype=torch.bool)
        if call.mask is not None:
            came = call.mask[:, :, 0, 0].any(1).expand_as(came)
        real = None if flat.real is None else torch.cat([flat.real, came[:, None]], 1)
        kept = self._decide(call, real)[..., 0]
        out = self.tokens.decode(call)
        self._forwards += 1
        flat = self.tokens.ragged  # another one if it has grown
        if policy.schedule == "step" and flat is not None:
            kept = kept | (flat.counts <= policy.protected)[:, None] | ~came[:, None]
            spans = self.tokens.spans(len(flat.counts), kept.device)
            if spans is not None:
                kept = kept | within(flat.counts - 1, spans)[:, None]
            flat.lengths.sub_(kept.logical_not().int())  # the next token takes its place
        return out

    def mask(self, call: AttentionCall) -> AttentionCall:
        """Hide what the gate drops of the T new tokens from all later queries, ``[B, Hs, T, N]``."""
        seen, policy = super().mask(call), self.policy
        first, slots, new = self._forwards == 0, self.live, call.q.shape[2]
        self._kept = None
        if policy.schedule == "prefill" and not first:
            return seen
        kept = self._decide(call, slots.valid)
        if not (first or policy.schedule == "step" or new > 1):
            return seen
        positions = slots.positions()[..., -new:]
        kept = kept | (positions < policy.protected)  # padding too: its position is -1
        if (spans := self.tokens.spans(len(kept), kept.device)) is not None:
            kept = kept | within(positions, spans)
        if bool(kept.all()):
            return seen
        self._kept = kept
        if new == 1:
            return seen
        later = kept[:, :, None, :] | torch.eye(new, dtype=torch.bool, device=kept.device)
        alive = later.new_ones(*later.shape[:3], slots.size)
        alive[..., -new:] = later
        allowed = seen.allowed()
        assert allowed is not None  # of several queries
        heads = max(allowed.shape[1], alive.shape[1])
        allowed = allowed if allowed.shape[1] == 1 else reference.repeat_kv(allowed, heads)
        return seen.replace(mask=reference.repeat_kv(alive, heads) & allowed, is_causal=False)

    def evict(self, call: AttentionCall) -> None:
        """Free what the gate dropped."""
        waits = self.prefilling and self.policy.schedule == "prefill"
        self._forwards += not waits
        kept, self._kept = self._kept, None
        if kept is not None:
            held = self.live.columns() >= 0
            held[..., -kept.shape[2] :] &= kept
            keep_marked(self.live, held)
            self._ragged = True
        if self.policy.schedule == "prefill" and not waits:
            self.state.clear()
        choose_storage(self, call.k, call.v)

    def crop(self, count: int) -> None:
        super().crop(count)
        if count and self.state:
            self.state.update({name: x[:, :, : x.shape[2] - count] for name, x in self.state.items()})

    def _decide(self, call: AttentionCall, real: Tensor | None) -> Tensor:
        """Whether each of the T new tokens is kept, ``[B, Hs, T]``; the gate's keys and values go into the state."""
        gates = self.policy.trained
        hidden = gates.reads(call, self.policy.gates)
        assert self.site.layer is not None
        gate = gates.placed(self.site.layer, hidden)
        q, k, v = gate.project(hidden.detach())
        if self.state:
            k, v = torch.cat([self.state[_KEYS], k], 2), torch.cat([self.state[_VALUES], v], 2)
        self.state[_KEYS], self.state[_VALUES] = k, v
        logits: Tensor = gate.decide(q, k, v, real)
        return logits.sigmoid() > self.policy.limit
