# SPDX-License-Identifier: Apache-2.0
"""Formulas of what a layer of attention costs: a frozen dataclass for each kind of computation.

Every family gives the stages of reading a whole sequence (``forward``), of training on it (``backward``), of one more
token (``step``), and the bytes that a layer remembers (``state``). A multiplication with addition is 2 FLOPs; matrix
products only. A stage counts every byte that it reads or writes once, and takes the longer of both, see
:class:`manyheads.attention.mla.Stage`. Projections and channel mixers are no part of it.

``fused`` says how it is computed. Fused is a kernel on a GPU: logits stay on the chip, and blocks that a mask hides
are skipped. Otherwise it is what the library's torch operators do on a CPU: blocks are padded and read whole, and
logits go through memory ``PASSES`` times. Full attention is fused everywhere: torch has a kernel for a CPU too. How
many operations torch is asked for is counted (a test counts again).

Legend: B rows, T tokens, H query heads, Hkv heads of keys and values, d channels of a head, i bytes of a number;
w window, b tokens of a block or chunk, S codewords.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

from ..attention.mla import Stage

__all__ = [
    "PASSES", "Family", "Layer", "Stages", "io_bytes", "logits", "padded", "passing", "read_cache", "scaled", "small",
    "total",
]  # fmt: skip

Stages = tuple[Stage, ...]
PASSES = 16  # times that torch reads or writes a logit of 4 bytes between its product and that with the values


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of a layer and of what it reads.

    Attributes:
        length: T, tokens of a row; of a decoding step those that came before, and the new one.
        batch, heads, kv_heads, head_dim: B, H, Hkv and d.
        itemsize: i, bytes of a number of queries, keys and values.
        causal: whether a token sees none after it.
    """

    length: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    causal: bool = True

    @property
    def rows(self) -> int:
        """B H T, the queries of all heads."""
        return self.batch * self.heads * self.length

    @property
    def held(self) -> int:
        """B Hkv T, the keys of all heads."""
        return self.batch * self.kv_heads * self.length

    def at(self, length: int) -> "Layer":
        """The same with another length."""
        return replace(self, length=length)


def scaled(stages: Sequence[Stage], by: float) -> Stages:
    """``by`` times the work: a part of the layers, or a longer pass."""
    return tuple(
        replace(s, flops=s.flops * by, bytes=s.bytes * by, launches=s.launches * by, host=s.host * by) for s in stages
    )


def total(stages: Sequence[Stage]) -> tuple[float, float]:
    """FLOPs and bytes of all stages."""
    return sum(stage.flops for stage in stages), sum(stage.bytes for stage in stages)


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A kind of attention, as far as its cost goes."""

    _backward: ClassVar[tuple[float, float]] = (2.5, 2.5)  # FLOPs and bytes as multiples of forward: weights anew

    @abstractmethod
    def forward(self, layer: Layer, fused: bool = True) -> Stages:
        """Attention of a whole sequence."""

    @abstractmethod
    def step(self, layer: Layer, fused: bool = True) -> Stages:
        """Attention of one more token of each row, the ``layer.length``-th."""

    @abstractmethod
    def state(self, layer: Layer) -> int:
        """Bytes on the device that a layer remembers after ``layer.length`` tokens."""

    def backward(self, layer: Layer, fused: bool = True) -> Stages:
        """Gradients, after a forward pass."""
        flops, moved = self._backward
        return tuple(
            replace(s, name=f"{s.name}, backward", flops=flops * s.flops, bytes=moved * s.bytes)
            for s in self.forward(layer, fused)
        )


def io_bytes(layer: Layer) -> int:
    """Bytes of reading queries, keys and values of a sequence once, and of writing outputs."""
    return 2 * layer.itemsize * layer.head_dim * (layer.rows + layer.held)


def passing(name: str, moved: float, launches: float) -> Stage:
    """Operations of torch that only move numbers, each into new memory."""
    return Stage(name, 0, moved, launches, fresh=True)


def small(count: float) -> Stage:
    """Operations of torch, views among them, on tensors so small that only their launch counts."""
    return Stage("small operations", 0, 0, count)


def logits(name: str, layer: Layer, pairs: float, passes: int = PASSES, pieces: float = 1) -> Stages:
    """Both products over ``pairs`` of all heads, and what happens to logits in memory between them, in pieces."""
    return (
        Stage(name, 4 * pairs * layer.head_dim, layer.itemsize * 4 * layer.rows * layer.head_dim, 2),
        passing("softmax", 4 * passes * pairs, passes / 2 * pieces),
    )


def read_cache(layer: Layer, slots: int, size: float = 0) -> Stages:
    """One query of each row over ``slots`` keys and values, ``size`` bytes of both together."""
    size = size or 2 * layer.head_dim * layer.itemsize
    held = layer.batch * layer.kv_heads * slots
    flops = 4 * layer.batch * layer.heads * slots * layer.head_dim
    return (Stage("read the cache", flops, held * size),)


def padded(a: int, b: int) -> int:
    """``a`` in whole blocks of ``b``."""
    return ceil(a / b) * b
