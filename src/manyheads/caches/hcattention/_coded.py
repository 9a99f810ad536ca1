# SPDX-License-Identifier: Apache-2.0
"""The tokens of one layer as codes on the device and values on the host, the first and the last of them exact.

A *slot* is a token in its row. Rows that are padded are brought to the right when they are first coded, so that the
same tokens are exact whatever stands beside a row; ``order`` says which column a slot was then.

Legend: B rows, Hkv key/value heads, d channels, g sub-vectors, c centroids of w channels, S slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention import product_codes
from ...attention.block_pattern import blocks_of
from ...attention.codec import Codec
from ...attention.offloaded import HostRows, codec_of
from ...attention.reference import widened

__all__ = ["BLOCK", "CodedTokens", "Rows", "align", "by_slot", "joined"]

BLOCK = 128  # tokens whose keys are summed, where blocks are picked by their means

_ROOM = 64  # tokens by which the codes grow at least
Rows = tuple[Tensor, Tensor]  # keys and values [B, Hkv, T, d]


def joined(*parts: Rows) -> Rows:
    """Keys and values of one stretch of tokens after the other."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def align(k: Tensor, v: Tensor, valid: Tensor) -> tuple[Rows, Tensor, Tensor | None]:
    """Bring what is not ``valid [B, S]`` to the front of each row.

    Returns:
        Keys and values, how many slots in front hold padding ``[B]``, and the column of each slot ``[B, S]``, None
        where padding stood in front already.
    """
    order, pad = valid.int().argsort(dim=1, stable=True), (~valid).sum(1)
    if bool((order == torch.arange(order.shape[1], device=order.device)).all()):
        return (k, v), pad, None
    at = order[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    moved = [x.gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in (k, v)]
    return (moved[0], moved[1]), pad, order


def by_slot(mask: Tensor | None, order: Tensor | None) -> Tensor | None:
    """A mask ``[B or 1, 1 or H, T, S]`` over columns as one over slots, of which ``order [B, S]`` says the column."""
    if mask is None or order is None:
        return mask
    mask, early = mask.expand(len(order), -1, -1, -1), order.shape[1]
    at = order[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return torch.cat([mask[..., :early].gather(3, at), mask[..., early:]], 3)


@dataclass(slots=True)
class CodedTokens:
    """S slots, of which the first ``coded`` are codes, and the others exact.

    Attributes:
        centroids: ``[B or 1, Hkv, g, c, w]``.
        codes: ``[B, Hkv, g, C]``, with room for more.
        values: of the coded slots, on the host.
        value_scale: ``[B, Hkv, C]`` of values in FP8 or INT4, None where they are as they came.
        sinks: keys and values of the first tokens, also when they are coded; slots that are not coded hold zeros.
        recent: keys and values of the slots from ``coded`` on.
        window: how many of these there are at most between forwards.
        key_error: largest distance of a coded key from what its code says, ``[B, Hkv]``.
        pad: slots of padding in front ``[B]``, None where there is none.
        order: column of each of the slots that were there when padding was moved.
        coded: slots.
        sums: of the coded keys of each BLOCK slots, ``[B, Hkv, C / BLOCK, d]`` at least float32; None where nothing
            is picked by them.
    """

    centroids: Tensor
    codes: Tensor
    values: HostRows
    value_scale: Tensor | None
    sinks: Rows
    recent: Rows
    window: int
    key_error: Tensor
    pad: Tensor | None = None
    order: Tensor | None = None
    coded: int = 0
    sums: Tensor | None = None

    @classmethod
    def empty(cls, centroids: Tensor, recent: Rows, window: int, sinks: int, values: HostRows) -> "CodedTokens":
        """Nothing coded yet; ``recent`` will follow what is."""
        k = recent[0]
        batch, heads = k.shape[:2]
        codes = torch.zeros(
            batch, heads, centroids.shape[2], 0, dtype=product_codes.code_dtype(centroids.shape[3]), device=k.device
        )
        scale = None if codec_of(values.data) is None else k.new_zeros(batch, heads, 0, dtype=torch.bfloat16)
        first = tuple(x.new_zeros(batch, heads, sinks, x.shape[3]) for x in recent)
        error = torch.zeros(batch, heads, device=k.device)
        return cls(centroids, codes, values, scale, (first[0], first[1]), recent, window, error)

    @property
    def seen(self) -> int:
        return self.coded + self.recent[0].shape[2]

    @property
    def codec(self) -> Codec | None:
        """What the values are stored by."""
        return codec_of(self.values.data)

    @property
    def device(self) -> list[Tensor | None]:
        """Every tensor on the device."""
        tails = [*self.sinks, *self.recent]
        return [self.centroids, self.codes, self.value_scale, self.key_error, self.pad, self.order, self.sums, *tails]

    def reserve(self, capacity: int) -> None:
        """Have room for the codes of ``capacity`` tokens."""

        def larger(x: Tensor) -> Tensor:
            room = x.new_zeros(*x.shape[:-1], capacity)
            room[..., : self.coded] = x[..., : self.coded]
            return room

        if capacity > self.codes.shape[3]:
            self.codes = larger(self.codes)
            self.value_scale = None if self.value_scale is None else larger(self.value_scale)
            if self.sums is not None:
                more = blocks_of(capacity, BLOCK) - self.sums.shape[2]
                self.sums = torch.nn.functional.pad(self.sums, (0, 0, 0, more))

    def code(self, k: Tensor, v: Tensor, written: bool = False) -> None:
        """Code the next T tokens; ``written``: their values lie on the host already."""
        start, stop = self.coded, self.coded + k.shape[2]
        if start == stop:
            return
        if stop > self.codes.shape[3]:
            self.reserve(max(stop, start + max(_ROOM, start // 32)))
        codes = product_codes.encode(k, self.centroids)
        error = product_codes.key_error(k, codes, self.centroids).to(self.key_error.dtype)
        if self.pad is not None:
            slot = torch.arange(start, stop, device=k.device)
            error = error.masked_fill((slot < self.pad[:, None])[:, None], 0.0)
        self.key_error = torch.maximum(self.key_error, error.amax(2))
        self.codes[..., start:stop] = codes
        self._keep_sinks(k, v, start)
        if self.sums is not None:
            first, last = start // BLOCK, blocks_of(stop, BLOCK)
            whole = torch.nn.functional.pad(widened(k), (0, 0, start - first * BLOCK, last * BLOCK - stop))
            self.sums[:, :, first:last] += whole.unflatten(2, (-1, BLOCK)).sum(3)
        if written:
            self.values.size = stop
        elif self.codec is None or self.value_scale is None:
            self.values.append(v)
        else:
            packed, self.value_scale[..., start:stop] = self.codec.encode(v)
            self.values.append(packed)
        self.coded = stop

    def _keep_sinks(self, k: Tensor, v: Tensor, start: int) -> None:
        """Keep those of the first tokens that are among ``[B, Hkv, T, d]`` from slot ``start`` on."""
        count = self.sinks[0].shape[2]
        if not count or (self.pad is None and start >= count):
            return
        slot = self.first_slots(count) - start
        inside = ((slot >= 0) & (slot < k.shape[2]))[:, None, :, None]
        at = slot.clamp(0, k.shape[2] - 1)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
        kept = [
            torch.where(inside, x.gather(2, at.expand(-1, -1, -1, x.shape[3])), held)
            for x, held in zip((k, v), self.sinks, strict=True)
        ]
        self.sinks = kept[0], kept[1]

    def first_slots(self, count: int) -> Tensor:
        """Slots of the first ``count`` tokens of each row ``[B, count]``."""
        slot = torch.arange(count, device=self.codes.device).expand(self.codes.shape[0], -1)
        return slot if self.pad is None else slot + self.pad[:, None]

    def take(self, new: Rows) -> tuple[Rows, int]:
        """Add the new tokens, and code what is no longer among the last.

        Returns:
            All tokens that were exact before that, the new ones included, and the slot of the first of them.
        """
        tail, start = joined(self.recent, new), self.coded
        gone = max(0, tail[0].shape[2] - self.window)
        self.code(tail[0][:, :, :gone], tail[1][:, :, :gone])
        self.recent = (tail[0][:, :, gone:].clone(), tail[1][:, :, gone:].clone()) if gone else tail
        return tail, start

    def exact(self, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Exact tokens: keys and values ``[B, Hkv, E, d]``, which may be attended to ``[B, E]``, None for all.

        The last of the four says how many coded slots in front are none of the others ``[B]``: padding, and the sinks.

        Args:
            allowed: ``[B or 1, S]``, which slots the model allows; None for all.
        """
        count = min(self.sinks[0].shape[2], self.coded)
        k, v = joined((self.sinks[0][:, :, :count], self.sinks[1][:, :, :count]), self.recent)
        first = self.first_slots(count)
        after = torch.full_like(first[:, 0], count) if count else torch.zeros_like(self.codes[:, 0, 0, 0]).long()
        after = after if self.pad is None else self.pad + count
        if self.pad is None and allowed is None:
            return k, v, None, after
        last = torch.arange(self.coded, self.seen, device=k.device).expand(k.shape[0], -1)
        seen = torch.cat([first < self.coded, last >= self.first_slots(1)], 1)
        if allowed is not None:
            given = allowed.expand(k.shape[0], -1)
            seen &= torch.cat([given.gather(1, first.clamp(max=self.seen - 1)), given[:, self.coded :]], 1)
        return k, v, seen, after

    def whole(self, tail: Rows, start: int, since: int) -> Rows:
        """Keys and values of all slots, on the device: as stored below ``since``, but for the first tokens.

        ``tail`` are exact from ``start``.
        """
        if not since:
            return tail
        coded = product_codes.decode(self.codes[..., :since], self.centroids), self.stored_values(0, since)
        k, v = (
            torch.cat([x.to(y.dtype), y[:, :, since - start :]], 2) for x, y in zip(coded, tail, strict=True)
        )  # fmt: skip
        slots = self.first_slots(self.sinks[0].shape[2])
        return _put(k, self.sinks[0], slots, since), _put(v, self.sinks[1], slots, since)

    def stored_values(self, start: int, stop: int) -> Tensor:
        """Values ``[B, Hkv, T, d]`` of coded slots, brought from the host."""
        v = self.values.read(start, stop)
        if self.codec is None or self.value_scale is None:
            return v
        return self.codec.decode(v, self.value_scale[..., start:stop], self.sinks[1].dtype)

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows ``[B']``."""
        rows = rows.to(self.codes.device)
        if self.centroids.shape[0] > 1 or len(rows) == 0:
            self.centroids = self.centroids[rows]
        self.codes, self.key_error = self.codes[rows], self.key_error[rows]
        self.value_scale, self.pad, self.order, self.sums = (
            None if x is None else x[rows] for x in (self.value_scale, self.pad, self.order, self.sums)
        )
        self.sinks, self.recent = ((x[rows], y[rows]) for x, y in (self.sinks, self.recent))
        self.values.reorder(rows)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and numbers by name; room for more is left out."""
        end = self.coded
        return {
            "centroids": self.centroids, "codes": self.codes[..., :end].contiguous(),
            "values": self.values.state_dict(),
            "value_scale": None if self.value_scale is None else self.value_scale[..., :end].contiguous(),
            "sink_k": self.sinks[0], "sink_v": self.sinks[1], "recent_k": self.recent[0], "recent_v": self.recent[1],
            "window": self.window, "key_error": self.key_error, "pad": self.pad, "order": self.order, "coded": end,
            "sums": None if self.sums is None else self.sums[:, :, : blocks_of(end, BLOCK)].contiguous(),
        }  # fmt: skip

    @classmethod
    def of(cls, state: dict[str, Any]) -> "CodedTokens":
        """What :meth:`state_dict` gave, tensors on the device of the model."""
        held = dict(state)
        sinks, recent = ((held.pop(f"{name}_k"), held.pop(f"{name}_v")) for name in ("sink", "recent"))
        values = HostRows.of(held.pop("values")["rows"], recent[0].device)
        return cls(**held, values=values, sinks=sinks, recent=recent)


def _put(x: Tensor, rows: Tensor, slots: Tensor, since: int) -> Tensor:
    """``x [B, H, S, d]`` with ``rows [B, H, n, d]`` in the slots ``[B, n]`` that are below ``since``."""
    for i in range(slots.shape[1]):
        at = slots[:, i].clamp(max=since - 1)[:, None, None, None].expand(-1, x.shape[1], 1, x.shape[3])
        inside = (slots[:, i] < since)[:, None, None, None]
        x.scatter_(2, at, torch.where(inside, rows[:, :, i : i + 1], x.gather(2, at)))
    return x
