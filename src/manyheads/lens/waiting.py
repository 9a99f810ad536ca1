# SPDX-License-Identifier: Apache-2.0
"""Decoded tokens wait and are looked at together: one pass over the cache for a block of them, in place of one each.

A token that is decoded reads every key once. Were it looked at by itself, each lens would read them all once more, and
its hundred small operations would take longer than the layer. But keys stay where they are: what a query gave to each
can as well be computed later, as long as the cache only grows. So queries wait, up to a block of them, and a lens sees
a block as it would see a chunk of a prompt. Nothing is computed on the way: waiting costs no kernel and no look at the
device.

Who waits: single tokens of causal self-attention with all their keys in a tensor of its own, as ``DynamicCache`` and
``full`` hold them. Where keys are dropped, moved or written in place (windows, compressed and static caches) each token
is looked at as it comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UserError

if TYPE_CHECKING:
    from ..call import AttentionCall

__all__ = ["BLOCK", "Waiting"]

BLOCK = 64  # tokens that wait at most


class Waiting:
    """What waits at one site.

    Attributes:
        rows: of each token what differs from the others: queries, mask, input, positions, rotary tables, output.
        hidden, parts: what the block of the site said of the same tokens, for lenses that read the stream.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.hidden: list[Tensor] = []
        self.parts: list[tuple[Tensor, dict[str, Tensor], Tensor]] = []
        self._first: AttentionCall | None = None  # without keys
        self._start = 0
        self._held: tuple[Tensor, Tensor] | None = None  # keys and values, while the cache holds the same
        self._past: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def follow(self, past: Any, qkv: tuple[Tensor, ...], mask: Tensor | None, rest: Sequence[Any], out: Tensor) -> bool:
        """Let a token wait behind those that wait, where it is the next of the same sequence.

        Args:
            past: its cache.
            qkv: its query, and the keys and values of all.
            mask: of the keys, None for all.
            rest: its input, positions and rotary tables.
            out: its output.
        """
        rows, (q, k, v) = self.rows, qkv
        if not rows or past is None or past is not self._past() or k.shape[2] != self._start + len(rows) + 1:
            return False
        if q.requires_grad or q.shape[0] != rows[0][0].shape[0]:
            return False
        self._held = k, v
        rows.append((q, mask, *rest, out))
        return True

    def joins(self, call: AttentionCall, out: Tensor) -> bool:
        """:meth:`follow` with ``call``, where it may wait."""
        return _may_wait(call) and self.follow(call.past, (call.q, call.k, call.v), call.mask, _rest(call), out)

    def begins(self, call: AttentionCall, out: Tensor) -> bool:
        """Let ``call`` wait as the first of a block, where nothing waits and it may."""
        if self.rows or not _may_wait(call) or not _keeps_all(call):
            return False
        none = call.q[:, :, :0]  # not of the keys: a view would hold them all
        self._first = call.replace(k=none, v=none, past=None, cache=None, hidden=None, rotary=None)
        self._start, self._past = int(call.step), weakref.ref(call.past)
        self._held = call.k, call.v
        self.rows.append((call.q, call.mask, *_rest(call), out))
        return True

    def goes_on(self, call: AttentionCall) -> bool:
        """Whether ``call`` is of the next token behind those that wait."""
        rows = self.rows
        step = int(call.step)
        return step == self._start + len(rows) and call.past is self._past() and call.q.shape[0] == rows[0][0].shape[0]

    def entering(self, past: Any) -> None:
        """The module is about to run with the cache ``past``: it will have the keys again, and may now make others."""
        if self._held is not None and past is not None and self._past() is past:
            self._held = None

    def together(self, now: AttentionCall | None) -> tuple[AttentionCall, Tensor]:
        """All that waits as one call and its output; nothing waits then.

        Args:
            now: a later call of the same sequence, which has all their keys; None where none is at hand.
        """
        q, masks, hidden, positions, rotary, outs = zip(*self.rows, strict=True)
        first, past, start = self._first, self._past(), self._start
        assert first is not None
        size = start + len(q)
        if now is not None and now.k.shape[2] < size + now.q.shape[2]:
            now = None  # of what waits, some is gone
        held, self.rows, self._held, self._past, self._first = self._held, [], None, None, None
        if now is not None:
            keys, values = now.k[:, :, :size], now.v[:, :, :size]
        elif held is not None:
            keys, values = held
        else:
            self.blocks(0)
            raise UserError(
                f"the cache at {first.site.name} was changed while a lens counted its tokens (cut back, or rows left "
                "it): generate without an assistant model, and with a lens one sequence at a time"
            )
        mask = None
        if any(x is not None for x in masks):
            seen = [
                keys.new_ones(len(keys), 1, 1, i, dtype=torch.bool) if x is None else x.expand(len(keys), -1, -1, -1)
                for i, x in enumerate(masks, start + 1)
            ]
            mask = torch.cat([pad(x, (0, size - x.shape[3])) for x in seen], 2)
        made = first.replace(
            q=torch.cat(q, 2), k=keys, v=values, mask=mask, is_causal=mask is None, hidden=_joined(hidden),
            positions=_joined(positions), rotary=_tables(rotary), past=past,
        )  # fmt: skip
        return made, torch.cat(outs, 1)

    def blocks(self, count: int) -> tuple[Tensor | None, tuple[Tensor, dict[str, Tensor], Tensor] | None]:
        """What the block gave for ``count`` tokens that waited, if it gave it for all: its output, and its parts."""
        hidden, parts, self.hidden, self.parts = self.hidden, self.parts, [], []
        joined = None
        if parts and len(parts) == count:
            names = set(parts[0][1]).intersection(*(each for _, each, _ in parts))
            joined = (
                torch.cat([x for x, _, _ in parts], 1),
                {name: torch.cat([each[name] for _, each, _ in parts], 1) for name in parts[0][1] if name in names},
                torch.cat([x for _, _, x in parts], 1),
            )
        return (torch.cat(hidden, 1) if hidden and len(hidden) == count else None), joined


def _rest(call: AttentionCall) -> tuple[Any, ...]:
    return call.hidden, call.positions, call.rotary


def _may_wait(call: AttentionCall) -> bool:
    """Whether ``call`` is of a single token behind others, and nothing but a mask of keys is on it."""
    q, mask, step, size = call.q, call.mask, call.step, call.k.shape[2]
    if q.shape[2] != 1 or size == 1 or not isinstance(step, int) or size != step + 1 or call.past is None:
        return False
    if call.bias is not None or call.prepended or q.requires_grad or torch.compiler.is_compiling():
        return False
    return mask is None or (mask.shape[1:3] == (1, 1) and mask.shape[3] == size)


def _keeps_all(call: AttentionCall) -> bool:
    """Whether the keys of ``call`` are a tensor of their own, to which later tokens only add."""
    if call.site.kind != "self" or not call.site.causal:
        return False
    if call.cache is not None:
        return call.cache.appends and not call.cache.fixed
    layers = getattr(call.past, "layers", ())
    layer = layers[call.site.layer] if call.site.layer is not None and call.site.layer < len(layers) else None
    if getattr(layer, "is_sliding", False):
        return False
    return call.k.untyped_storage().nbytes() == call.k.numel() * call.k.element_size()


def _joined(given: Sequence[Tensor | None]) -> Tensor | None:
    known = [x for x in given if x is not None]
    return torch.cat(known, 1) if len(known) == len(given) else None


def _tables(given: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    known = [x for x in given if x is not None]
    if len(known) < len(given):
        return None
    return torch.cat([x for x, _ in known], 1), torch.cat([x for _, x in known], 1)
