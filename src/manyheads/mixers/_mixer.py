# SPDX-License-Identifier: Apache-2.0
"""The protocol of token mixers, the base of softmax mixers, their state, and strategies that edit their attention.

A mixer is a module ``mixer(x [B, T, dim], *, mask=None, state=None, cu_seqlens=None) -> (y [B, T, dim], state)``.
``mask [B, T]`` marks real tokens. The state returned is what the next call goes on from: ``mixer(x)`` equals
``mixer(x[:, :a])`` and then ``mixer(x[:, a:], state=...)``. ``cu_seqlens [N + 1]`` packs N sequences in one row.

Where layers share what is made once, of boxes on a page for instance, the first has ``prepare(x, layout=, mask=,
cu_seqlens=) -> (x, shared)``: what is read, and by name what every layer's mixer is given in addition.

A mixer that is built with ``config.causal`` False sees both sides: it takes whole sequences and has no state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attention.masks import MaskSpec, masked_attention, zero_padding
from ..attention.positions import positions_of, split_heads
from ..call import AttentionCall, MixerConfig, Site
from ..errors import UserError
from ..strategy import AttentionEdit

__all__ = [
    "KVState",
    "SoftmaxMixer",
    "State",
    "edited",
    "positions_of",
    "projections",
    "split_heads",
    "whole",
]


class State(Protocol):
    """The state of a mixer between calls."""

    def reorder(self, rows: Tensor) -> Any: ...
    def detach(self) -> Any: ...
    @property
    def nbytes(self) -> int: ...


class KVBuffer:
    """Keys and values with capacity for more tokens, shared by states; the state at the end of what is used may add."""

    def __init__(self, k: Tensor, v: Tensor, positions: Tensor, more: int) -> None:
        more += k.shape[2] // 8 + 64
        self.k, self.v = (torch.cat([x, x.new_empty(*x.shape[:2], more, x.shape[3])], 2) for x in (k, v))
        self.positions = torch.cat([positions, positions.new_full((positions.shape[0], more), -1)], 1)
        self.used = k.shape[2]

    def add(self, k: Tensor, v: Tensor, positions: Tensor) -> bool:
        """Write tokens behind those that are there; False where they do not fit."""
        end = self.used + k.shape[2]
        if end > self.k.shape[2]:
            return False
        self.k[:, :, self.used : end], self.v[:, :, self.used : end] = k, v
        self.positions[:, self.used : end] = positions
        self.used = end
        return True


@dataclass(frozen=True, slots=True)
class KVState:
    """Keys and values of what came before.

    Attributes:
        k, v: ``[B, Hkv, S, d]`` as attention uses them.
        positions: ``[B, S]`` of the keys, -1 for padding.
        seen: ``[B]`` tokens so far.
        padded: whether padding may stand among them.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    seen: Tensor
    padded: bool = False
    _buffer: KVBuffer | None = None

    def reorder(self, rows: Tensor) -> "KVState":
        return KVState(self.k[rows], self.v[rows], self.positions[rows], self.seen[rows], self.padded)

    def detach(self) -> "KVState":
        return KVState(self.k.detach(), self.v.detach(), self.positions, self.seen, self.padded)

    def join(self, k: Tensor, v: Tensor, positions: Tensor, seen: Tensor, padded: bool) -> "KVState":
        """This state with ``k, v [B, Hkv, T, d]`` at ``positions [B, T]`` behind it; this one stays as it is."""
        if k.requires_grad or self.k.requires_grad:
            parts = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2), torch.cat([self.positions, positions], 1)
            return KVState(*parts, seen, padded)
        buffer = self._buffer
        if buffer is None or buffer.used != self.k.shape[2] or not buffer.add(k, v, positions):
            buffer = KVBuffer(self.k, self.v, self.positions, more=k.shape[2])
            buffer.add(k, v, positions)
        end = buffer.used
        return KVState(buffer.k[:, :, :end], buffer.v[:, :, :end], buffer.positions[:, :end], seen, padded, buffer)

    def last(self, count: int) -> "KVState":
        """The last ``count`` columns."""
        if self.k.shape[2] <= count:
            return self
        k, v = (x[:, :, -count:].contiguous() for x in (self.k, self.v))
        return KVState(k, v, self.positions[:, -count:].contiguous(), self.seen, self.padded)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held; unused capacity is not counted."""
        return sum(x.nbytes for x in (self.k, self.v, self.positions, self.seen))


def whole(state: Any) -> None:
    """Refuse a state: what sees both sides reads a whole sequence at once.

    Raises:
        UserError: there is one.
    """
    if state is not None:
        raise UserError("a bidirectional mixer has no state: give it whole sequences")


def projections(config: MixerConfig) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Linear layers without a bias to q, k and v of all heads, and back to the model's width."""
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, k, v = (nn.Linear(config.dim, width, bias=False) for width in (wide, narrow, narrow))
    return q, k, v, nn.Linear(wide, config.dim, bias=False)


class SoftmaxMixer(nn.Module):
    """Softmax attention whose positions are a transform of q and of k, or a bias; the base of its variants.

    A variant overrides :meth:`transform_q` and :meth:`transform_k`, so that attention itself stays SDPA and the cache
    holds what it reads, or :meth:`bias`.

    Attributes:
        editor: what edits its attention, and the site that this is to it; see :func:`edited`.
    """

    def __init__(self, config: MixerConfig, *, window: int | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.config = config
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.spec = MaskSpec(causal=config.causal, window=window)
        self.editor: tuple[Site, AttentionEdit] | None = None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections(config)

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        """``q [B, H, T, d]`` at ``positions [B, T]`` of sequences that are ``length [B]`` tokens long so far."""
        return q

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        """``k [B, Hkv, T, d]``, likewise; what it gives is kept."""
        return k

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Additive logits ``[B or 1, H, T, S]`` for positions ``[B, T]`` and ``[B, S]``."""
        return None

    def queries_and_keys(self, x: Tensor, positions: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """``q [B, H, T, d]`` and ``k [B, Hkv, T, d]`` of inputs ``x [B, T, dim]``, transformed."""
        q = self.transform_q(split_heads(self.q_proj(x), self.config.num_heads), positions, length)
        return q, self.transform_k(split_heads(self.k_proj(x), self.config.num_kv_heads), positions, length)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys: Tensor, spec: MaskSpec, **given: Any
    ) -> Tensor:
        """``[B, H, T, d]`` of queries at ``at [B, T]`` and keys at ``keys [B, S]``; ``given``: see masked_attention."""
        bias = self.bias(at, keys)
        if self.editor is not None:
            site, strategy = self.editor
            plain = spec.plain and not given
            mask = None if plain else spec.dense(q.shape[2], k.shape[2], device=q.device, **given)
            call = strategy.edit(AttentionCall(site, q, k, v, self.scale, mask=mask, bias=bias, is_causal=plain))
            if call.mask is not mask or call.is_causal != plain:
                raise UserError(f"{strategy.spec} edits the mask, which {site.name} of a Decoder does not take")
            q, k, v, bias = call.q, call.k, call.v, call.bias
        return self.attention(q, k, v, spec, bias, **given)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, bias: Tensor | None, **given: Any) -> Tensor:
        """Attention itself, as :func:`masked_attention`."""
        return masked_attention(q, k, v, spec, scale=self.scale, bias=bias, **given)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: KVState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, KVState | None]:
        batch, length = x.shape[:2]
        if not self.config.causal:
            whole(state)
        x = zero_padding(x, mask)
        at = positions_of(batch, length, x.device, mask, None if state is None else state.seen, cu_seqlens)
        seen = at.amax(1) + 1 if state is None else torch.maximum(at.amax(1) + 1, state.seen)
        q, k = self.queries_and_keys(x, at, seen)
        v = split_heads(self.v_proj(x), self.config.num_kv_heads)
        if cu_seqlens is not None:
            if state is not None:
                raise UserError("softmax mixers take packed sequences from their start: no state with cu_seqlens")
            y, after = self._packed(q, k, v, at, cu_seqlens)
            return y, after if self.config.causal else None
        padded = mask is not None or (state is not None and state.padded)
        held = KVState(k, v, at, seen, padded) if state is None else state.join(k, v, at, seen, padded)
        given: dict[str, Any] = {}
        if padded or (self.spec.window is not None and state is not None):  # columns are not positions
            given = {"positions": (at, held.positions), "real": held.positions >= 0}
        out = self._attend(q, held.k, held.v, at, held.positions, self.spec, **given)
        y = self.out_proj(out.transpose(1, 2).flatten(2))
        if not self.config.causal:
            return y, None
        return y, held if padded or self.spec.window is None else held.last(self.spec.window)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, KVState]:
        """N sequences in one row; their states stand in N rows, padded on the left."""
        document = torch.cumsum(at[0] == 0, 0)[None]
        spec = replace(self.spec, documents=document)
        out = self._attend(q, k, v, at, at, spec, positions=(at, at))
        bounds = list(pairwise(cu_seqlens.tolist()))
        longest = max(b - a for a, b in bounds)
        fill = torch.nn.functional.pad
        ks, vs = (torch.cat([fill(x[:, :, a:b], (0, 0, longest - b + a, 0)) for a, b in bounds]) for x in (k, v))
        places = torch.cat([fill(at[:, a:b], (longest - b + a, 0), value=-1) for a, b in bounds])
        return self.out_proj(out.transpose(1, 2).flatten(2)), KVState(ks, vs, places, cu_seqlens.diff(), True)


@contextmanager
def edited(model: nn.Module, strategy: AttentionEdit) -> Iterator[nn.Module]:
    """While open, ``strategy`` edits queries, keys, values and bias of the softmax mixers of a Decoder it selects.

    An inner use of it stands in for an outer one.

    Raises:
        UserError: it selects none.
    """
    mixers = [(name, m, m.config) for name, m in model.named_modules() if isinstance(m, SoftmaxMixer)]
    sites = [
        (Site(name, i, config.layer, "self", True, config.num_heads, config.num_kv_heads, m.spec.window), m)
        for i, (name, m, config) in enumerate(mixers)
    ]
    chosen = [(site, mixer, mixer.editor) for site, mixer in sites if strategy.selects(site)]
    if not chosen:
        raise UserError(f"{strategy.spec} finds no softmax mixer to act on in {type(model).__name__}")
    try:
        for site, mixer, _ in chosen:
            mixer.editor = (site, strategy)
        yield model
    finally:
        for _, mixer, before in chosen:
            mixer.editor = before
