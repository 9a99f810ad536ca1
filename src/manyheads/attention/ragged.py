# SPDX-License-Identifier: Apache-2.0
"""Ragged and packed storage of one cache layer: every row and head has as many slots as it holds tokens.

All tokens of a layer lie in one run of P slots, row after row and head after head; ``offsets`` and ``lengths`` say
where those of a head begin and how many they are. No slot is empty, so decoding needs no mask and reads no byte in
vain. Each head has ``room`` for tokens to come. With a codec the tokens are stored as codes, but for the last W of each
row, which stay in the model's dtype in a ring of W + 1 places (position p at place p mod (W + 1), one place for the
token that comes) and are encoded once, when they leave it.

Appending and attending touch host numbers only to know when the room ends; ``fixed`` storage does not even that:
all shapes are static and all counters are on the device, so that a step can be compiled and replayed as a CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..errors import UserError
from .codec import Codec, KVCodec
from .padded import PaddedCache

__all__ = ["RaggedCache", "decode_attention", "pack"]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    codec: KVCodec | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    recent_k: Tensor | None = None,
    recent_v: Tensor | None = None,
    recent_length: Tensor | None = None,
    capacity: int,
) -> Tensor:
    """Attention of one query per row over ragged storage: the twin of the kernel, on any device.

    Args:
        q: ``[B, H, d]``.
        k, v: ``[P, d]``, or codes ``[P, w]`` with ``k_scale, v_scale [P]``.
        offsets, lengths: ``[B, Hkv]``, the slots of each head.
        scale: factor on ``q k^T``.
        codec: of the codes.
        k_scale, v_scale: of the codes.
        recent_k, recent_v: ``[B, Hkv, W, d]``, of which the first ``recent_length [B]`` count.
        recent_length: ``[B]``.
        capacity: bound on the lengths.

    Returns:
        ``[B, H, d]`` in the dtype of q.
    """
    at = torch.arange(capacity, device=q.device)
    mask, none = (at < lengths[..., None])[:, :, None], (lengths == 0)[..., None, None]
    # What lies behind a head's tokens may be NaN: its first token is read instead, with a weight of 0.
    where = (offsets[..., None] + at * mask[:, :, 0]).clamp(max=max(0, k.shape[0] - 1))
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (offsets.shape[1], -1)).to(work)  # [B, Hkv, G, d]: keys are not repeated

    def read(plane: Tensor, by: Codec | None) -> Tensor:
        """Numbers ``[B, Hkv, N, d]``, without their scales: these multiply logits and weights instead."""
        found = _bits(plane).index_select(0, where.flatten()).view(plane.dtype)
        numbers: Tensor = (found if by is None else by.numbers(found)).to(work).unflatten(0, where.shape)
        return numbers

    def scales(factor: Tensor | None) -> Tensor | float:
        return 1.0 if factor is None else factor[where][:, :, None].to(work)

    x = grouped @ read(k, None if codec is None else codec.keys).transpose(-1, -2) * (scales(k_scale) * scale)
    x = x.masked_fill(~mask, -torch.inf)
    if recent_k is not None and recent_length is not None:
        new = (torch.arange(recent_k.shape[2], device=q.device) < recent_length[:, None])[:, None]
        late = (grouped @ recent_k.to(work).transpose(-1, -2) * scale).masked_fill(~new[:, :, None], -torch.inf)
        x = torch.cat([x, late], -1)
    weights = x.softmax(-1)
    out: Tensor = (weights[..., :capacity] * scales(v_scale)) @ read(v, None if codec is None else codec.values)
    out = out.masked_fill(none, 0.0)
    if recent_v is not None and recent_length is not None:
        late = weights[..., capacity:] @ recent_v.to(work).masked_fill(~new[..., None], 0.0)
        out = out + late.masked_fill(none & (recent_length == 0)[:, None, None, None], 0.0)
    together: Tensor = out.flatten(1, 2).to(q.dtype)
    return together


@dataclass(slots=True)
class RaggedCache:
    """Tokens of one layer. P slots, Hs heads, W tokens in the ring, d channels (w bytes as codes).

    Attributes:
        k, v: ``[P, d]``, or codes ``[P, w]``.
        k_scale, v_scale: ``[P]`` of the codes.
        index: column of each slot, ``[P]`` int32.
        offsets: ``[B, Hs]`` int64; lengths: ``[B, Hs]`` int32; ends: ``[B, Hs]`` int64, where the room of a head ends.
        counts: tokens seen per row ``[B]`` int64, padding not counted.
        clock: columns seen, ``[]`` int64.
        ring_k, ring_v: ``[B, Hs, W + 1, d]``, keys multiplied by ``key_scale``; ring_index: ``[B, W + 1]`` int32.
        key_scale: ``[B, Hs, d]`` factors on the keys before they are encoded, 1 where None.
        valid: columns that hold tokens, as in PaddedCache, up to the time of packing.
        codec: of the codes.
        dtype: of keys and values as attention uses them.
        capacity: most slots of a head; room: tokens that still fit, as the host knows.
        seen: columns at the time of packing.
        kernel: whether the GPU kernel attends.
        made: columns since then, as the host knows; -1 where only the device does (``fixed``).
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    index: Tensor
    offsets: Tensor
    lengths: Tensor
    ends: Tensor
    counts: Tensor
    clock: Tensor
    ring_k: Tensor | None
    ring_v: Tensor | None
    ring_index: Tensor | None
    key_scale: Tensor | None
    valid: Tensor | None
    codec: KVCodec | None
    dtype: torch.dtype
    capacity: int
    room: int
    seen: int
    kernel: bool
    made: int = 0

    @property
    def fixed(self) -> bool:
        return self.made < 0

    def fix(self) -> None:
        """From now on count on the device only. The room can then not grow: a step past its end raises."""
        self.made = -1
        for x in self.tensors:
            if x is not None:
                torch._dynamo.mark_static_address(x)

    @property
    def tensors(self) -> list[Tensor | None]:
        """Everything held."""
        return [
            self.k, self.v, self.k_scale, self.v_scale, self.index, self.offsets, self.lengths, self.ends, self.counts,
            self.clock, self.ring_k, self.ring_v, self.ring_index, self.key_scale, self.valid,
        ]  # fmt: skip

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
        """Take the next token of each row and attend to everything held.

        With a codec the token that leaves the ring is encoded after it was attended to.

        Args:
            q: ``[B, H, 1, d]``.
            k, v: ``[B, Hs, 1, d]``.
            scale: factor on ``q k^T``.
            real: ``[B]`` bool, False where the token is padding; None for all.

        Returns:
            ``[B, 1, H, d]``.
        """
        one = torch.ones_like(self.counts) if real is None else real.to(self.counts.dtype)
        column = self.clock.int()
        if self.ring_k is None or self.ring_v is None or self.ring_index is None:
            self._push(k[:, :, 0], v[:, :, 0], column.expand(self.counts.shape[0]), one)
            self.counts.add_(one)
            out = self._attend(q, scale, None)
        else:
            if self.key_scale is not None:
                k = (k * self.key_scale[:, :, None]).to(k.dtype)
            places = self.ring_k.shape[2]
            place, at = self._place(self.counts)
            came = one.bool()[:, None]
            self.ring_index.scatter_(1, place, torch.where(came, column, self.ring_index.gather(1, place)))
            for ring, x in ((self.ring_k, k), (self.ring_v, v)):
                ring.scatter_(2, at, torch.where(came[:, None, :, None], x.to(ring.dtype), ring.gather(2, at)))
            self.counts.add_(one)
            out = self._attend(q, scale, self.counts.clamp(max=places).int())
            place, at = self._place(self.counts)  # of the oldest, which the next token will take
            self._push(
                self.ring_k.gather(2, at)[:, :, 0], self.ring_v.gather(2, at)[:, :, 0],
                self.ring_index.gather(1, place)[:, 0], one * (self.counts >= places),
            )  # fmt: skip
        self.clock.add_(1)
        if not self.fixed:
            self.made += 1
            self.room -= 1
        return out

    def _place(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Place of ``position [B]`` in the ring: ``[B, 1]``, and for every head and channel ``[B, Hs, 1, d]``."""
        assert self.ring_k is not None
        place = (position % self.ring_k.shape[2])[:, None]
        return place, place[:, None, :, None].expand(-1, self.ring_k.shape[1], -1, self.ring_k.shape[3])

    def _push(self, k: Tensor, v: Tensor, column: Tensor, one: Tensor) -> None:
        """Put ``k, v [B, Hs, d]`` behind the last slot of each head, but for rows where ``one`` is 0."""
        to = (self.offsets + self.lengths).where(self.offsets + self.lengths < self.ends, self.k.shape[0]).flatten()
        self.index.index_copy_(0, to, column[:, None].expand(-1, k.shape[1]).flatten())
        codecs = (None, None) if self.codec is None else (self.codec.keys, self.codec.values)
        for plane, factor, x, codec in ((self.k, self.k_scale, k, codecs[0]), (self.v, self.v_scale, v, codecs[1])):
            if codec is None or factor is None:
                plane.index_copy_(0, to, x.flatten(0, 1).to(plane.dtype))
                continue
            codes, scale = codec.encode(x.flatten(0, 1))
            _bits(plane).index_copy_(0, to, _bits(codes))
            factor.index_copy_(0, to, scale)
        self.lengths.add_(one[:, None].int())

    def _attend(self, q: Tensor, scale: float, recent: Tensor | None) -> Tensor:
        """Attention of ``q [B, H, 1, d]``, ``[B, 1, H, d]``; ``recent [B]`` places of the ring are filled."""
        x = q[:, :, 0]
        if self.key_scale is not None:
            x = (x / self.key_scale.repeat_interleave(x.shape[1] // self.key_scale.shape[1], 1)).to(q.dtype)
        out: Tensor
        if self.kernel and q.shape[1] // self.offsets.shape[1] <= 32:  # query heads of a group that the kernel takes
            from ..kernels import decode

            out = decode.decode_attention(
                x, self.k, self.v, self.offsets, self.lengths, scale=scale, k_scale=self.k_scale, v_scale=self.v_scale,
                recent_k=self.ring_k, recent_v=self.ring_v, recent_length=recent, capacity=self.capacity,
            )[0]  # fmt: skip
        else:
            out = decode_attention(
                x, self.k, self.v, self.offsets, self.lengths, scale=scale, codec=self.codec, k_scale=self.k_scale,
                v_scale=self.v_scale, recent_k=self.ring_k, recent_v=self.ring_v, recent_length=recent,
                capacity=self.capacity,
            )  # fmt: skip
        return out[:, None]

    @property
    def _made(self) -> int:
        """Columns since packing; waits for the device where only that knows."""
        return int(self.clock) - self.seen if self.fixed else self.made

    @property
    def real(self) -> Tensor | None:
        """Columns that hold tokens ``[B, seen]`` up to now, None for all."""
        if self.valid is None:
            return None
        return torch.cat([self.valid, self.valid.new_ones(self.valid.shape[0], self._made)], 1)

    def unpack(self) -> PaddedCache:
        """The same tokens as slots ``[B, Hs, N, d]``, in the order of columns; codes go along unchanged."""
        made = self._made
        at = torch.arange(self.capacity, device=self.k.device)
        where = (self.offsets[..., None] + at).clamp(max=max(0, self.k.shape[0] - 1))
        index = torch.where(at < self.lengths[..., None], self.index[where], -1)
        extras = {}
        if self.codec is None or self.k_scale is None or self.v_scale is None:
            keys, values = self.k[where], self.v[where]
        else:
            k, v = _bits(self.k)[where], _bits(self.v)[where]
            k_scale, v_scale = self.k_scale[where], self.v_scale[where]
            keys = self.codec.keys.decode(k.view(self.k.dtype), k_scale, torch.float32)
            values = self.codec.values.decode(v.view(self.v.dtype), v_scale, self.dtype)
            extras = dict(zip(_CODED, (k, k_scale[..., None], v, v_scale[..., None]), strict=True))
        if self.ring_k is not None and self.ring_v is not None and self.ring_index is not None:
            width = self.ring_k.shape[2]
            places, free = torch.arange(width, device=self.k.device), (self.counts % width)[:, None]
            held = (places < self.counts[:, None]) & (places != free)  # what the next token will take was encoded
            late = torch.where(held, self.ring_index, -1)[:, None].expand(-1, index.shape[1], -1)
            index = torch.cat([index, late], 2)
            keys = torch.cat([keys, self.ring_k.to(keys.dtype)], 2)
            values = torch.cat([values, self.ring_v], 2)
            extras = {
                name: torch.cat([x, x.new_zeros(*x.shape[:2], width, x.shape[3])], 2) for name, x in extras.items()
            }
        if self.key_scale is not None:
            keys = keys / self.key_scale[:, :, None]
        valid = self.real
        slots = PaddedCache(keys.to(self.dtype), values.to(self.dtype), self.seen + made, index, valid, extras)
        order = at.expand_as(index) if self.ring_k is None else torch.where(index < 0, _LAST, index).argsort(dim=-1)
        held = (index >= 0).sum(-1)
        fewest, most = torch.stack([held.min(), held.max()]).tolist()
        slots.keep(order[..., :most], index.gather(2, order[..., :most]) >= 0, fewest == most and valid is None)
        return slots


_LAST = torch.iinfo(torch.int32).max
_CODED = ("k_codes", "k_scale", "v_codes", "v_scale")  # a k_scale above 0 tells that a slot has codes


def _bits(x: Tensor) -> Tensor:
    """Codes as bytes: 8-bit floats cannot be indexed."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def pack(
    slots: PaddedCache,
    *,
    codec: KVCodec | None = None,
    window: int = 0,
    key_scale: Tensor | None = None,
    room: int = 16,
) -> RaggedCache:
    """Move the tokens of ``slots`` into ragged storage.

    Args:
        slots: with keys and values of the same head dimension; afterwards not used any more.
        codec: how to store all but the last ``window`` tokens of each row; None stores them as they are.
        window: W; the last W tokens of every row must all be there.
        key_scale: ``[B, Hs, d]`` factors on the keys.
        room: tokens per row that may come.

    Raises:
        UserError: a codec, and a head that dropped one of the last ``window`` tokens.
    """
    columns, counts = slots.columns(), slots.counts()
    batch, heads, size = columns.shape
    positions, device = slots.positions(), columns.device
    packed = columns >= 0
    ring_k = ring_v = ring_index = None
    if codec is None and slots.even:
        return _regular(slots, counts, room)
    if codec is not None:
        late = packed & (positions >= (counts - window)[:, None, None])
        packed = packed & ~late
        # Slots that do not belong into the ring go to a place behind it, cut off again.
        places = window + 1
        place = torch.where(late, positions % places, places)
        scaled = slots.keys if key_scale is None else slots.keys * key_scale[:, :, None]
        ring_k, ring_v = (_scatter(x.to(slots.keys.dtype), place, places) for x in (scaled, slots.values))
        ring_index = columns.new_zeros(batch, heads, places + 1).scatter(2, place, columns)[:, 0, :places].int()
        if not torch.equal(late.sum(-1), counts.clamp(max=window)[:, None].expand(-1, heads)):
            raise UserError(
                f"a packed cache needs the last {window} tokens of every row: protect them by recent={window}"
            )
    order = torch.where(packed, torch.arange(size, device=device), size).argsort(dim=-1, stable=True)
    lengths = packed.sum(-1)
    ends = (lengths + room).flatten().cumsum(0).view(batch, heads)
    offsets = ends - lengths - room
    total, capacity = int(ends[-1, -1]), int(lengths.max()) + room
    source = packed.gather(2, order)
    to = (offsets[..., None] + torch.arange(size, device=device))[source]

    def flat(x: Tensor) -> Tensor:
        run = x.new_zeros(total, *x.shape[3:])
        picked = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) if x.ndim == 4 else x.gather(2, order)
        run[to] = picked[source]
        return run

    k, v, k_scale, v_scale = slots.keys, slots.values, None, None
    if codec is not None:
        k, k_scale, v, v_scale = _encoded(slots, codec, key_scale)
        k_scale, v_scale = flat(k_scale), flat(v_scale)
    return RaggedCache(
        flat(_bits(k)).view(k.dtype), flat(_bits(v)).view(v.dtype), k_scale, v_scale, flat(columns.int()),
        offsets, lengths.int(), ends, counts.clone(), torch.tensor(slots.seen, device=device), ring_k, ring_v,
        ring_index, key_scale, slots.valid, codec, slots.keys.dtype, capacity, room, slots.seen,
        kernels.decode_takes(slots.keys),
    )  # fmt: skip


def _regular(slots: PaddedCache, counts: Tensor, room: int) -> RaggedCache:
    """Ragged storage of slots of which none is empty: a copy, nothing to be found out."""
    batch, heads, size, _ = slots.keys.shape
    each = size + room
    ends = (torch.arange(1, batch * heads + 1, device=counts.device) * each).view(batch, heads)

    def flat(x: Tensor) -> Tensor:
        run = x.new_zeros(batch, heads, each, *x.shape[3:])
        run[:, :, :size] = x
        return run.flatten(0, 2)

    lengths = torch.full_like(ends, size, dtype=torch.int32)
    return RaggedCache(
        flat(slots.keys), flat(slots.values), None, None, flat(slots.columns().int()), ends - each, lengths, ends,
        counts.clone(), torch.tensor(slots.seen, device=counts.device), None, None, None, None, slots.valid, None,
        slots.keys.dtype, each, room, slots.seen, kernels.decode_takes(slots.keys),
    )  # fmt: skip


def _scatter(x: Tensor, place: Tensor, places: int) -> Tensor:
    """``x [B, Hs, N, d]`` at ``place [B, Hs, N]`` of so many places; what goes beyond them is left out."""
    ring = x.new_zeros(*x.shape[:2], places + 1, x.shape[3])
    return ring.scatter(2, place[..., None].expand(-1, -1, -1, x.shape[3]), x)[:, :, :places].contiguous()


def _encoded(slots: PaddedCache, codec: KVCodec, key_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of keys and values; slots that have codes keep them."""
    keys = slots.keys.float() if key_scale is None else slots.keys * key_scale[:, :, None]
    k, k_scale = codec.keys.encode(keys)
    v, v_scale = codec.values.encode(slots.values)
    if slots.extras.keys() >= set(_CODED):
        old_k, old_ks, old_v, old_vs = (slots.extras[name] for name in _CODED)
        coded = old_ks > 0
        k, v = (torch.where(coded, old, _bits(x)).view(x.dtype) for old, x in ((old_k, k), (old_v, v)))
        k_scale, v_scale = (
            torch.where(coded, a, b[..., None])[..., 0] for a, b in ((old_ks, k_scale), (old_vs, v_scale))
        )
    return k, k_scale, v, v_scale
