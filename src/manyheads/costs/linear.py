# SPDX-License-Identifier: Apache-2.0
"""Attention with a state of fixed size, and layers of several kinds. Legend in :mod:`.base`."""

from dataclasses import dataclass
from typing import ClassVar

from ..attention.mla import Stage
from .base import PASSES, Family, Layer, Stages, logits, padded, passing, scaled, small

__all__ = ["Decay", "Mixed", "VectorQuantised"]


@dataclass(frozen=True, kw_only=True)
class Decay(Family):
    """Linear attention, with decay or without: quadratic within chunks, a matrix for each head between them.

    Attributes:
        chunk: tokens of a chunk.
        normaliser: whether a sum of keys is kept beside the matrix.
        key_dim: channels of queries and keys as a multiple of d.
        head_bytes, row_bytes: of what is kept beside, for a head of a row and for a row.
    """

    chunk: int = 64
    normaliser: bool = False
    key_dim: float = 1.0
    head_bytes: int = 0
    row_bytes: int = 0

    _backward: ClassVar = (2.5, 1.75)

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        d, heads, i = layer.head_dim, layer.batch * layer.heads, layer.itemsize
        k, c = d * self.key_dim, min(self.chunk, layer.length)
        long = padded(layer.length, c)
        rows, chunks = heads * long, long // c
        flops = 2 * rows * (c * (k + d) + 2 * k * d)
        moved, states = i * 2 * layer.rows * (k + d), 4 * heads * chunks * k * d
        if fused:
            return (Stage("chunks", flops, moved + 2 * states, 2),)
        each, once = (11, 94) if self.normaliser else (6, 49)  # operations for each chunk, and for all
        return (
            Stage("products", flops, moved + 2 * states, 5),
            passing("weights", 4 * 12 * rows * c, 6),
            passing("decay", 4 * rows * (8 * k + 8 * d), 16),
            passing("scan", 7 * states, 3 * chunks),
            small((each - 3) * chunks + once - 27),
        )

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        matrix = layer.batch * layer.heads * layer.head_dim**2 * self.key_dim
        if fused:
            return (Stage("step", 4 * matrix, 8 * matrix, 1),)
        return (Stage("step", 4 * matrix, 4 * 9 * matrix, 10), small(18))

    def state(self, layer: Layer) -> int:
        keys = round(layer.head_dim * self.key_dim)
        held = keys * (layer.head_dim + self.normaliser)
        return layer.batch * (layer.heads * (4 * held + self.head_bytes) + self.row_bytes)


@dataclass(frozen=True, kw_only=True)
class VectorQuantised(Family):
    """Softmax over keys that are codewords: near blocks key by key, all others by codeword.

    Attributes:
        codes: S, codewords.
        block: tokens of a block; a query reads its own and the one before it, an encoder's also the one behind it.
    """

    codes: int = 128
    block: int = 128

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        d, s, b = layer.head_dim, self.codes, self.block
        heads, rows = layer.batch * layer.heads, layer.batch * layer.heads * padded(layer.length, b)
        nearest = Stage("nearest codeword", 2 * layer.rows * s * d, 4 * 3 * layer.rows * s, 6)
        if 1 < layer.length <= 2 * b + s * (1 + 2 * d // b):  # the operator reads so few keys one by one
            counted = Stage("sums of values", 2 * layer.rows * s * d, 4 * 8 * layer.rows * s, 12)
            return (nearest, counted, small(117), *logits("attention", layer, heads * layer.length**2))
        near = rows * (2 if layer.causal else 3) * b
        sums = Stage("sums of values", 2 * (rows + layer.causal * heads * b) * s * d, 4 * 8 * rows * s, 12)
        by_block = passing("sums so far", 4 * 8 * rows / b * s * d, 8)
        passes = 8 if fused else PASSES + 4
        return (nearest, sums, by_block, small(160), *logits("attention", layer, near + rows * s, passes))

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        keys = 2 * self.block + self.codes
        held = layer.batch * layer.heads * keys * layer.head_dim
        read = Stage("step", 4 * held, 2 * layer.itemsize * held * 4, 20)
        return (read, small(103))

    def state(self, layer: Layer) -> int:
        near = 2 * self.block * (2 * layer.head_dim * layer.itemsize + 8)
        far = 4 * self.codes * (1 + layer.head_dim)
        return layer.batch * (layer.heads * (near + far) + 8)


@dataclass(frozen=True, kw_only=True)
class Mixed(Family):
    """Layers of several kinds: costs and state of the mean layer.

    Attributes:
        parts: share of the layers, length that they see as a share of T, and their family.
    """

    parts: tuple[tuple[float, float, Family], ...]

    def _each(self, layer: Layer, what: str, fused: bool) -> Stages:
        found: Stages = ()
        for share, part, family in self.parts:
            found += scaled(getattr(family, what)(layer.at(max(1, round(layer.length * part))), fused), share)
        return found

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        return self._each(layer, "forward", fused)

    def backward(self, layer: Layer, fused: bool = True) -> Stages:
        return self._each(layer, "backward", fused)

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        return self._each(layer, "step", fused)

    def state(self, layer: Layer) -> int:
        parts = (
            share * family.state(layer.at(max(1, round(layer.length * part)))) for share, part, family in self.parts
        )
        return round(sum(parts))
