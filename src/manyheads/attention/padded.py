# SPDX-License-Identifier: Apache-2.0
"""Padded storage of one cache layer: keys and values that may be dropped, and which token each slot holds.

A cache that simply shrinks loses three things: how many tokens were seen (so the next token gets a wrong position and
``generate`` feeds tokens again), which column of the attention mask a slot belongs to (so padding masks the wrong
keys), and the order of tokens. A padded cache keeps all three:

- ``seen``: the logical length, which never shrinks.
- ``index [B, Hs, N]`` int32: the column of the whole sequence that a slot holds, -1 for an empty slot. None as long as
  nothing was dropped: then slot j is column j and no byte is spent on it.
- ``extras``: by name, what a policy remembers of each slot ``[B, Hs | Hkv, N, e]`` (hashes, codes);
  a new slot starts with zeros.
- ``valid [B, seen]`` bool: columns that hold a token and not padding. None as long as no mask was ever given.

Hs is the number of heads *stored*: Hkv, or 1 for latent caches (MLA). Every head drops its own slots.

Decoding appends into room reserved an eighth ahead, so that a token does not copy the cache.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import UserError
from .reference import repeat_kv

__all__ = ["PaddedCache", "nbytes"]

_FEW = 16  # fewer new tokens than this are decoding: they get room ahead


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the storages that ``tensors`` keep alive, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """``x [B, Hs, N, d]`` at ``slots [B, Hs, M]`` -> ``[B, Hs, M, d]``."""
    return x.gather(2, slots[..., None].expand(*slots.shape, x.shape[-1]))


def _reserve(x: Tensor, more: int) -> Tensor:
    """A tensor that begins with ``x [B, Hs, N, d]`` and has ``more`` slots after it."""
    room = x.new_empty(*x.shape[:2], x.shape[2] + more, x.shape[3])
    room[:, :, : x.shape[2]] = x
    return room


def _look_up(table: Tensor, columns: Tensor) -> Tensor:
    """``table [B, seen]`` at ``columns [B, Hs, N]``; what an empty slot (-1) reads means nothing."""
    batch, heads, size = columns.shape
    return table.gather(1, columns.clamp(min=0).reshape(batch, heads * size)).view(batch, heads, size)


def _extend(slots: "PaddedCache", k: Tensor, v: Tensor) -> None:
    """Add keys and values, in room reserved ahead while decoding."""
    size, new = slots.size, k.shape[2]
    if new >= _FEW or not size or k.requires_grad or slots.keys.requires_grad:
        slots.keys, slots.values = torch.cat([slots.keys, k], 2), torch.cat([slots.values, v], 2)
        slots._room = None
        return
    if slots._room is None or slots._room[0].shape[2] < size + new:
        more = new + max(_FEW, size // 8)
        slots._room = (_reserve(slots.keys, more), _reserve(slots.values, more))
    room_k, room_v = slots._room
    room_k[:, :, size : size + new], room_v[:, :, size : size + new] = k, v
    slots.keys, slots.values = room_k[:, :, : size + new], room_v[:, :, : size + new]


@dataclass(slots=True)
class PaddedCache:
    """Keys ``[B, Hs, N, dk]`` and values ``[B, Hs, N, dv]`` of N slots.

    ``even`` says that every head of every row holds the same number of tokens, in order, and no slot is empty: then a
    causal mask is all the mask there is.
    """

    keys: Tensor
    values: Tensor
    seen: int
    index: Tensor | None = None
    valid: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    even: bool = True
    _room: tuple[Tensor, Tensor] | None = None  # tensors of which keys and values are the beginning

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> "PaddedCache":
        """No slots yet, with the batch, heads, dtype and device of ``k`` and ``v``."""
        return cls(k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3]), 0)

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    def twin(self) -> "PaddedCache":
        """A second, independent set over the same tensors: what is appended to one does not reach the other."""
        return replace(self, extras=dict(self.extras), _room=None)

    @property
    def tensors(self) -> list[Tensor | None]:
        """Everything held."""
        return [self.keys, self.values, self.index, self.valid, *self.extras.values()]

    def update(self, k: Tensor, v: Tensor) -> None:
        """Add the next T columns. k ``[B, Hs, T, dk]``, v ``[B, Hs, T, dv]``."""
        batch, heads, new = k.shape[:3]
        if self.index is not None:
            columns = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=k.device)
            self.index = torch.cat([self.index, columns.expand(batch, heads, new)], 2)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(batch, new)], 1)
        for name, x in self.extras.items():
            self.extras[name] = torch.cat([x, x.new_zeros(batch, x.shape[1], new, x.shape[3])], 2)
        _extend(self, k, v)
        self.seen += new

    def mark(self, valid: Tensor) -> None:
        """Say which of the last T columns hold tokens: ``valid [B, T]`` bool."""
        self.even = False
        if self.valid is None:
            self.valid = torch.ones(self.keys.shape[0], self.seen, dtype=torch.bool, device=self.keys.device)
        self.valid = torch.cat([self.valid[:, : self.seen - valid.shape[1]], valid], 1)

    def columns(self) -> Tensor:
        """Column of each slot ``[B, Hs, N]`` (int64), -1 where a slot is empty or holds padding."""
        columns = self._raw.long()
        if self.valid is None:
            return columns
        return columns.masked_fill((columns < 0) | ~_look_up(self.valid, columns), -1)

    @property
    def _raw(self) -> Tensor:
        """``index``, also while nothing was dropped: int32 ``[B, Hs, N]``, columns of padding included."""
        if self.index is not None:
            return self.index
        columns = torch.arange(self.size, dtype=torch.int32, device=self.keys.device)
        return columns.expand(*self.keys.shape[:2], -1)

    def positions(self) -> Tensor:
        """Position of each slot within its own row ``[B, Hs, N]``: padding is not counted; -1 where empty."""
        columns = self.columns()
        if self.valid is None:
            return columns
        rank = self.valid.long().cumsum(1) - 1
        return torch.where(columns >= 0, _look_up(rank, columns), -1)

    def counts(self) -> Tensor:
        """Tokens seen per row ``[B]`` int64, padding not counted."""
        if self.valid is None:
            return torch.full((self.keys.shape[0],), self.seen, device=self.keys.device)
        return self.valid.sum(1)

    def visible(self, mask: Tensor | None, num_queries: int, older: bool = False) -> Tensor | None:
        """Mask of the slots for the last T queries, ``[B, Hs | H, T, N]``, from the model's mask over all columns.

        Args:
            mask: ``[B, 1 | H, T, W]`` bool as the model built it for the last W columns of the whole sequence, or None
                for "causal, nothing else".
            num_queries: T.
            older: whether tokens before the W columns are visible; under a sliding window they are not.

        Returns:
            ``mask`` itself while nothing was dropped: attention then is bit for bit that of an ordinary cache.
        """
        if self.index is None and (self.valid is None if mask is None else mask.shape[-1] == self.size):
            return mask
        whole = not older or (mask is not None and mask.shape[-1] == self.seen)  # it speaks for padding, too
        columns = self._raw.long() if whole else self.columns()
        columns = columns if self.index is not None else columns[:, :1]  # the same for every head
        if mask is None:
            queries = torch.arange(self.seen - num_queries, self.seen, device=columns.device)[:, None]
            return (columns[:, :, None, :] >= 0) & (columns[:, :, None, :] <= queries)
        columns = repeat_kv(columns, max(mask.shape[1], columns.shape[1]))
        held, columns = columns >= 0, columns - (self.seen - mask.shape[-1])
        mask = mask.expand(columns.shape[0], columns.shape[1], -1, -1)
        picked = mask.gather(3, columns.clamp(min=0)[:, :, None, :].expand(-1, -1, num_queries, -1))
        if not older:
            return picked & (columns >= 0)[:, :, None, :]
        return (picked | (columns < 0)[:, :, None, :]) & held[:, :, None, :]

    def keep(self, slots: Tensor, kept: Tensor, whole: bool = False) -> None:
        """Keep ``slots [B, Hs, M]`` where ``kept [B, Hs, M]`` is True, and empty the other of the M places.

        ``whole`` says that ``kept`` is True everywhere and ``slots`` ascend, which is not looked up in the tensors.
        """
        self.even = self.even and whole
        self._room = None
        self.index = torch.where(kept, self._raw.gather(2, slots), -1).int()
        self.keys, self.values = _gather(self.keys, slots), _gather(self.values, slots)
        self.extras = {name: _gather(x, slots.expand(-1, x.shape[1], -1)) for name, x in self.extras.items()}

    def narrow(self, start: int, size: int) -> None:
        """Keep ``size`` slots from ``start`` on, the same for every head, and free the others."""
        self.index = self._raw.narrow(2, start, size).clone()
        self.keys, self.values = (x.narrow(2, start, size).clone() for x in (self.keys, self.values))
        self.extras = {name: x.narrow(2, start, size).clone() for name, x in self.extras.items()}
        self._room = None

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows (beam search, expansion): ``rows`` int64 ``[B']``."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.index = None if self.index is None else self.index[rows]
        self.valid = None if self.valid is None else self.valid[rows]
        self.extras = {name: x[rows] for name, x in self.extras.items()}
        self._room = None

    def crop(self, count: int) -> None:
        """Forget the last ``count`` columns; only while nothing was dropped can this restore what was before."""
        if self.index is not None:
            raise UserError(
                "a cache that has dropped tokens cannot be cropped, what it dropped is gone: generate without an "
                "assistant or prompt lookup, or keep everything"
            )
        self.keys, self.values = self.keys[:, :, : self.size - count], self.values[:, :, : self.size - count]
        self.extras = {name: x[:, :, : self.size] for name, x in self.extras.items()}
        self._room = None
        self.valid = None if self.valid is None else self.valid[:, : self.seen - count]
        self.seen -= count
