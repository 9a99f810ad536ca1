# SPDX-License-Identifier: Apache-2.0
"""Strategies that do nothing, each in its own way, and strategies that are wrong on purpose."""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.caches._store import PolicyStore
from manyheads.caches._strategy import EvictionStrategy
from manyheads.caches._view import CacheView
from manyheads.caches.attention_gate import AttentionGate, Gates
from manyheads.caches.attention_gate.store import GateStore
from manyheads.call import AttentionCall, Site
from manyheads.strategy import AttentionCompute, AttentionEdit, AttentionPatch, AttentionWatch


class Watch(AttentionWatch):
    """Reads and counts."""

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        call.state["calls"] = call.state.get("calls", 0) + 1
        call.state["norm"] = out.norm()


class NoEdit(AttentionEdit):
    def edit(self, call: AttentionCall) -> AttentionCall:
        return call


class CopyEdit(AttentionEdit):
    """The same call with other tensors in it."""

    def edit(self, call: AttentionCall) -> AttentionCall:
        return call.replace(q=call.q.clone(), k=call.k.clone(), v=call.v.clone(), state={})


class NoPatch(AttentionPatch):
    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        return out


class Attend(AttentionCompute):
    """The reference attention in place of the model's own."""

    def attend(self, call: AttentionCall) -> Tensor:
        return call.attend()


class Sharpen(AttentionEdit):
    """A real edit."""

    def edit(self, call: AttentionCall) -> AttentionCall:
        return call.replace(scale=call.scale * 1.5)


class Mute(AttentionPatch):
    """A real patch: head 0 off."""

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(out[:, :, :1]), out[:, :, 1:]], 2)


class Meddle(AttentionWatch):
    """A wrong watch: it changes what it reads, by little."""

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        out.mul_(1 + 1e-6)


class DropMask(AttentionCompute):
    """A wrong attend: no mask."""

    def attend(self, call: AttentionCall) -> Tensor:
        return call.replace(mask=None, is_causal=False).attend()


class DropScale(AttentionCompute):
    """A wrong attend: its own scale."""

    def attend(self, call: AttentionCall) -> Tensor:
        return call.replace(scale=1.0).attend()


@dataclass(frozen=True, kw_only=True)
class Norm(EvictionStrategy):
    """A right policy written from its formula: keep the least values. (Key norms are all equal under QK norm.)"""

    def score(self, view: CacheView) -> Tensor:
        return -view.v.float().norm(dim=-1)


class Unmarked(PolicyStore):
    """Wrong: takes padding for tokens."""

    def mask(self, call: AttentionCall) -> AttentionCall:
        slots, new = self.live, call.q.shape[2]
        if slots.index is None:
            return call
        return call.replace(mask=slots.visible(call.mask, new), is_causal=False)


class MaskedOnly(PolicyStore):
    """Wrong: hides what it drops and frees nothing."""

    def compress(self, view: CacheView, share: object = None) -> None:
        slots, keys, values = self.live, self.live.keys, self.live.values
        super().compress(view)
        if slots.index is not None and slots.size < keys.shape[2]:
            gap = keys.shape[2] - slots.size
            slots.index = torch.nn.functional.pad(slots.index, (0, gap), value=-1)
            slots.keys = torch.cat([slots.keys, keys[:, :, :gap]], 2)
            slots.values = torch.cat([slots.values, values[:, :, :gap]], 2)

    def nbytes(self) -> int:
        return super().nbytes() // 2


class Blind(PolicyStore):
    """Wrong: keeps tokens that no query sees."""

    def mask(self, call: AttentionCall) -> AttentionCall:
        changed = super().mask(call)
        if changed is call or changed.mask is None:
            return changed
        mask = changed.mask.clone()
        mask[..., 0] = False
        return changed.replace(mask=mask)


class Forgetful(PolicyStore):
    """Wrong: its logical length is what is left."""

    @property
    def seen(self) -> int:
        return 0 if self.padded is None else self.padded.size


class Careless(PolicyStore):
    """Wrong: has not heard of protected spans."""

    def compress(self, view: CacheView, share: object = None) -> None:
        super().compress(dataclasses.replace(view, spans=None))


class Miscounted(PolicyStore):
    """Wrong: spans count columns, and so padding, too."""

    def compress(self, view: CacheView, share: object = None) -> None:
        padding = self.live.seen - view.counts
        spans = None if view.spans is None else (view.spans - padding[:, None, None])
        super().compress(dataclasses.replace(view, spans=spans))


@dataclass(frozen=True, kw_only=True)
class Wrong(Norm):
    """``Norm`` in a wrong store."""

    how: type[PolicyStore] = PolicyStore

    def store(self, site: object) -> PolicyStore:
        return self.how(self, site)  # type: ignore[arg-type]


@functools.cache
def drawn_gates(dim: int, kv_heads: int, layers: int = 2) -> Gates:
    """Gates with random weights, which keep about half of what they read."""
    with torch.random.fork_rng():
        torch.manual_seed(kv_heads)
        gates = Gates(dim, dict.fromkeys(range(layers), kv_heads), num_heads=1, head_dim=4, bias=0.0)
        for layer in range(layers):
            torch.nn.init.normal_(gates.gate(layer).out.weight, std=1.0)
    return gates


@dataclass(frozen=True, kw_only=True)
class DrawnGates(AttentionGate):
    """Attention gates with weights drawn for the model at hand (width 32)."""

    gates: str = "drawn"
    kv_heads: int = 0

    @functools.cached_property
    def trained(self) -> Gates:
        return drawn_gates(32, self.kv_heads)

    def store(self, site: Site) -> GateStore:
        return GateStore(dataclasses.replace(self, kv_heads=site.num_kv_heads), site)
