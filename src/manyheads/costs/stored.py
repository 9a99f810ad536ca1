# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over a cache that is kept smaller, or elsewhere. Legend in :mod:`.base`."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..attention.budget import keep_limit
from ..attention.mla import Dims, Stage, mla_cost
from .base import Family, Layer, Stages, padded, passing, read_cache, small
from .sparse import Softmax

__all__ = ["Evicted", "Latent", "Offloaded", "Quantised"]


@dataclass(frozen=True, kw_only=True)
class Evicted(Family):
    """Softmax attention that forgets: the prompt is read whole, then at most ``budget`` slots stay.

    Attributes:
        budget: a share of the tokens, or a number of slots.
        slot_bytes: of what is kept beside a key and a value: the column of each slot.
    """

    budget: float | int = 0.25
    slot_bytes: int = 4

    def slots(self, layer: Layer) -> int:
        """Slots that stay."""
        return keep_limit(self.budget, layer.length)

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        moved = layer.held * layer.head_dim * layer.itemsize + 2 * self.state(layer)
        return (*Softmax().forward(layer, fused), passing("score, drop", moved, 8))

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        return read_cache(layer, self.slots(layer), 2 * layer.head_dim * layer.itemsize + self.slot_bytes)

    def state(self, layer: Layer) -> int:
        one = 2 * layer.head_dim * layer.itemsize + (self.slot_bytes if self.slots(layer) < layer.length else 0)
        return layer.batch * layer.kv_heads * self.slots(layer) * one


@dataclass(frozen=True, kw_only=True)
class Quantised(Family):
    """Softmax attention over keys and values in few bits with a scale each, the last tokens as they are.

    Attributes:
        bits: of a channel.
        recent: last tokens that are kept in the model's numbers.
        smoothed: whether a factor for each channel is kept.
    """

    bits: int = 8
    recent: int = 0
    smoothed: bool = False
    _room: ClassVar[int] = 16  # slots ahead

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        moved = 2 * layer.held * layer.head_dim * layer.itemsize + self.state(layer)
        return (*Softmax().forward(layer, fused), passing("encode", moved, 8))

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        size = 2 * (layer.head_dim * self.bits / 8 + 2)
        if fused:
            return read_cache(layer, layer.length, size)
        # Codes are copied, turned into numbers of 4 bytes, and read by two products.
        return (*read_cache(layer, layer.length, 3 * size + 2 * layer.head_dim * (4 + 4 + 4)), small(55))

    def state(self, layer: Layer) -> int:
        d, i = layer.head_dim, layer.itemsize
        slots = layer.length - min(self.recent, layer.length) + self._room
        one = 2 * (d * self.bits // 8 + 2) + 4
        ring = self.recent + 1
        head = slots * one + 20 + ring * 2 * d * i + (d * i if self.smoothed else 0)
        return layer.batch * (layer.kv_heads * head + 4 * ring + 8) + 8


@dataclass(frozen=True, kw_only=True)
class Latent(Family):
    """Latent attention (MLA): expanded for a prompt, absorbed for a token, by :func:`manyheads.attention.mla_cost`.

    Attributes:
        rank, rope_dim: channels of the latent and of the rotary key, as multiples of d.
    """

    rank: float = 4.0
    rope_dim: float = 0.5
    _block: ClassVar[int] = 256  # tokens by which the store grows

    def dims(self, layer: Layer) -> Dims:
        """Sizes of the layer."""
        d = layer.head_dim
        return Dims(layer.heads, round(d * self.rank), d, round(d * self.rope_dim), d)

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        t, dims = layer.length, self.dims(layer)
        made = mla_cost("expand", dims, layer.batch, t, t, layer.itemsize, fused_heads=fused)
        seen = Softmax().pairs(layer) / t**2 if fused else 1.0
        made = tuple(replace(s, flops=s.flops * (seen if s.name == "attention" else 1), fresh=True) for s in made)
        return (*made, small(11))

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        made = mla_cost("absorb", self.dims(layer), layer.batch, 1, layer.length, layer.itemsize)
        return (*made, small(29))

    def state(self, layer: Layer) -> int:
        dims = self.dims(layer)
        return layer.batch * padded(layer.length, self._block) * (dims.rank + dims.rope_dim) * layer.itemsize


@dataclass(frozen=True, kw_only=True)
class Offloaded(Family):
    """Keys as codes on the device, values with the host; a share of them comes for each token.

    Attributes:
        channels: of a key for each byte of its code.
        fetched: share of the values that are fetched for a token.
        sinks, recent: first and last tokens that stay as they are.
        centroids: of a codebook of 4-byte numbers, one set for each row and head.
    """

    channels: int = 2
    fetched: float = 0.1
    sinks: int = 4
    recent: int = 32
    centroids: int = 256

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        size = layer.held * layer.head_dim * layer.itemsize
        encode = 2 * layer.held * self.centroids * layer.head_dim
        return (*Softmax().forward(layer, fused), Stage("encode, send", encode, 3 * size, 20, size))

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        d, held = layer.head_dim, layer.held
        coded = Stage("codes", 2 * layer.batch * layer.heads * self.centroids * d, held * (d / self.channels + 8), 20)
        fetched = self.fetched * held
        mixed = Stage("values", 2 * layer.rows * self.fetched * d, 0, 4, fetched * d * layer.itemsize)
        return (coded, mixed)

    def state(self, layer: Layer) -> int:
        d, i = layer.head_dim, layer.itemsize
        if layer.length < 2 * self.centroids:  # all exact until there are enough tokens for codebooks
            return Softmax().state(layer)
        codes = (layer.length + self.recent) * (d // self.channels)
        exact = 2 * (self.sinks + self.recent) * d * i
        return layer.batch * layer.kv_heads * (codes + exact + 4 * self.centroids * d + 4)
