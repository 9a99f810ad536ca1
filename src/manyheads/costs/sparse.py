# SPDX-License-Identifier: Apache-2.0
"""Softmax attention, over all keys or over some of them. Legend in :mod:`.base`."""

from dataclasses import dataclass, replace
from math import ceil

from ..attention.mla import Stage
from .base import PASSES, Family, Layer, Stages, io_bytes, logits, padded, passing, read_cache, scaled, small

__all__ = ["Encoder", "LocalGlobal", "MultiResolution", "Softmax", "Sparse"]

_SCRATCH = 1 << 24  # numbers that torch gathers at once on a CPU, see attention.reference.block_size


@dataclass(frozen=True, kw_only=True)
class Softmax(Family):
    """Softmax attention over all keys, or over a window.

    Attributes:
        window: keys that a query sees, itself among them; 0 for all.
        slot_bytes, row_bytes: of what is kept beside keys and values (positions), for a slot of a row and for a row.
    """

    window: int = 0
    slot_bytes: int = 0
    row_bytes: int = 0

    def pairs(self, layer: Layer) -> int:
        """Pairs of a query and a key that it sees, of one head of one row."""
        t, w = layer.length, min(self.window or layer.length, layer.length)
        seen = t * w - w * (w - 1) // 2
        return seen if layer.causal else 2 * seen - t

    def slots(self, layer: Layer) -> int:
        """Keys that the next token sees."""
        return min(layer.length, self.window or layer.length)

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        t, heads = layer.length, layer.batch * layer.heads
        if fused or not self.window or t <= 2 * self.window:
            return (Stage("attention", 4 * heads * self.pairs(layer) * layer.head_dim, io_bytes(layer)),)
        # Blocks of w queries over their own and the one before (and the one behind it), by torch's kernel with a mask.
        long, wide = padded(t, self.window), (2 if layer.causal else 3) * self.window
        pairs = long * wide
        copies = layer.itemsize * layer.rows * layer.head_dim * (2 * 3 + 2 * wide // self.window)
        return (
            passing("blocks", copies, 8),
            passing("mask", 40 * pairs, 8),
            small(29),
            Stage("attention", 4 * heads * pairs * layer.head_dim, io_bytes(layer) + 4 * heads * pairs),
        )

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        return read_cache(layer, self.slots(layer))

    def state(self, layer: Layer) -> int:
        slots = self.slots(layer)
        one = 2 * layer.kv_heads * layer.head_dim * layer.itemsize + self.slot_bytes
        return layer.batch * (slots * one + self.row_bytes)


@dataclass(frozen=True, kw_only=True)
class Sparse(Family):
    """Softmax attention over blocks of keys that are chosen for each block of queries; the cache stays whole.

    Attributes:
        block: tokens of a block.
        density: share of the visible pairs that is read.
        keys: in place of it, keys that a block of queries reads.
        skew: longest list of blocks as a multiple of the mean one: torch reads all as long as the longest.
        chosen: whether choosing counts: means of blocks, the scores of their pairs, and ``choosing`` passes over these.
    """

    block: int = 128
    density: float = 0.1
    keys: int = 0
    skew: float = 1.0
    chosen: bool = False
    choosing: int = 20

    def share(self, layer: Layer) -> float:
        """Share of the visible pairs that is read."""
        seen = Softmax().pairs(layer)
        if not self.keys:
            return min(1.0, self.density)
        return min(1.0, Softmax(window=min(self.keys, layer.length)).pairs(layer) / seen)

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        d, heads, i = layer.head_dim, layer.batch * layer.heads, layer.itemsize
        count = ceil(layer.length / self.block)
        pairs = heads * self.share(layer) * Softmax().pairs(layer)
        choice: Stages = ()
        if self.chosen:
            scores = heads * count * count
            means = i * layer.head_dim * (layer.rows + layer.held)
            choose = Stage("choose", 2 * scores * d, 4 * self.choosing * scores, 20)
            choice = (passing("means", means, 2), choose, small(100))
        if fused:
            return (*choice, Stage("attention", 4 * pairs * d, io_bytes(layer)))
        read = ceil(min(count, self.keys / self.block if self.keys else self.share(layer) * count))
        whole = heads * count * min(count, self.skew * read) * self.block**2
        pieces = ceil(whole * 2 * (d / self.block + 1) / _SCRATCH)
        gathered = passing("gather", 2 * 3 * i * d * whole / self.block, 8 * pieces)
        return (*choice, gathered, small(80), *logits("attention", layer, whole, PASSES + 4, pieces))

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        return read_cache(layer, layer.length)

    def state(self, layer: Layer) -> int:
        return Softmax().state(layer)


class Encoder(Family):
    """A family that sees both sides: it has no steps and remembers nothing."""

    def step(self, layer: Layer, fused: bool = True) -> Stages:
        """The share of a whole pass that a token has."""
        return scaled(self.forward(layer, fused), 1 / layer.length)

    def state(self, layer: Layer) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class LocalGlobal(Encoder):
    """An encoder's softmax over a window on either side and over one key for each block.

    Attributes:
        window: keys less than so many positions away.
        block: tokens of a block.
    """

    window: int = 128
    block: int = 16

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        heads, count = layer.batch * layer.heads, layer.length // self.block
        if fused:
            near = Softmax(window=self.window).pairs(replace(layer, causal=False))
            pairs = heads * (near + layer.length * count)
            return (Stage("attention", 4 * pairs * layer.head_dim, io_bytes(layer)),)
        pairs = heads * padded(layer.length, self.window) * (3 * self.window + count)
        copies = layer.itemsize * layer.rows * layer.head_dim * 2 * (1 + 3 + 3)
        return (passing("blocks", copies, 8), small(85), *logits("attention", layer, pairs, PASSES + 6))


@dataclass(frozen=True, kw_only=True)
class MultiResolution(Encoder):
    """An encoder's softmax over chosen pairs of blocks, exactly, and over means of blocks for all others.

    Attributes:
        per_row: blocks read exactly for each row of blocks, on average.
        block: tokens of a block.
        skew: longest row as a multiple of the mean one, as of :class:`Sparse`.
    """

    per_row: float = 4
    block: int = 32
    skew: float = 3.0

    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        d, heads, count = layer.head_dim, layer.batch * layer.heads, ceil(layer.length / self.block)
        refined, wide = min(self.per_row, count), replace(layer, causal=False)
        fine = Sparse(block=self.block, density=refined / count, skew=self.skew).forward(wide, fused)
        scores = heads * count * count
        parts = layer.itemsize * layer.rows * d
        coarse = (
            passing("means", 2 * 3 * parts, 12),
            Stage("coarse", 4 * scores * d, 4 * 40 * scores, 30),  # sorting takes most of the passes
            passing("merge", 10 * parts, 12),
            small(170),
        )
        return (*coarse, *fine)
