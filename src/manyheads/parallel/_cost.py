# SPDX-License-Identifier: Apache-2.0
"""What an exchange takes by the alpha-beta model: each message a latency, each byte its share of a link's bandwidth.

All times are seconds, all sizes bytes. Everything here is *modelled*: what was measured stands in results.

What a grid of processes works on and sends is counted in :mod:`._counts`; :func:`predict` turns it into seconds. A
process takes, for each step that waits for the one before, the longer of computing and of what is on its way meanwhile:

    ring         sum over steps of max(block, next block on its way); two rings: max(inner ring, block to next window)
    all_gather   gather, then all keys
    group_cast   max(own keys, cast), then the keys of others
    heads        all-to-all of queries, keys and values before that, and of the output after it

Backward the same with 2.5 times the operations; the gradients of a block go on when the block is done. That is what
:mod:`._exchanges` does; who overlaps more is faster than this says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ._exchanges import steps_away

if TYPE_CHECKING:
    from ._counts import Counts, Ints

__all__ = [
    "ASSUMED", "BACKWARD", "CLUSTERS", "Cluster", "Efficiency", "Link", "Prediction", "all_gather", "all_to_all",
    "best_pieces", "chain", "doubling", "predict",
]  # fmt: skip

Floats = NDArray[np.float64]
BACKWARD = 2.5  # operations of a backward pass over those of a forward one: five products, not two


@dataclass(frozen=True)
class Link:
    """What joins two devices, in one direction.

    Attributes:
        latency: seconds before the first byte of a message arrives, its launch included.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float

    def time(self, size: float, messages: float = 1) -> float:
        """Seconds of so many messages, one behind the other, of ``size`` bytes together."""
        return messages * self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Machines of devices.

    Attributes:
        within, between: links of two devices of one machine, and of two machines.
        node: devices of a machine.
        flops: floating-point operations per second of a device that dense matrix products reach at best.
        launch: seconds before a kernel starts.
    """

    within: Link
    between: Link
    node: int
    flops: float
    launch: float = 1e-5

    def link(self, ranks: int) -> Link:
        """The slowest link among so many neighbouring devices."""
        return self.within if ranks <= self.node else self.between


# NVLink 4 and 3: 450 and 300 GB/s in each direction; InfiniBand NDR and HDR: 400 and 200 Gb/s for each device or two.
CLUSTERS = {
    "h100": Cluster(Link(3e-6, 450e9), Link(7e-6, 50e9), 8, 989e12),
    "a100": Cluster(Link(3e-6, 300e9), Link(7e-6, 12.5e9), 8, 312e12),
}


def all_gather(link: Link, ranks: int, size: float) -> float:
    """Of ``size`` bytes of each of the processes, by a ring; a reduce-scatter takes as long."""
    return link.time((ranks - 1) * size, ranks - 1)


def all_to_all(link: Link, ranks: int, size: float) -> float:
    """Of ``size`` bytes that each process shares out evenly among all."""
    return link.time(size * (ranks - 1) / ranks, ranks - 1)


def chain(link: Link, ranks: int, size: float, pieces: int = 1) -> float:
    """From the first process through all to the last, in pieces that follow each other."""
    return 0.0 if ranks < 2 else (ranks - 2 + pieces) * link.time(size / pieces)


def best_pieces(link: Link, ranks: int, size: float) -> int:
    """Pieces with which :func:`chain` takes the least."""
    about = math.sqrt(max(ranks - 2, 0) * size / (link.latency * link.bandwidth))
    return min({max(1, math.floor(about)), math.ceil(about) or 1}, key=lambda n: chain(link, ranks, size, n))


def doubling(link: Link, ranks: int, size: float) -> float:
    """A scan in which each process reads from twice as far at each step."""
    return math.ceil(math.log2(ranks)) * link.time(size) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Efficiency:
    """Share of a device's best rate that attention reaches, by the length of a piece of queries and keys.

    Attributes:
        lengths: tokens, rising.
        shares: at each; between them on a line over the logarithm of the length.
        source: where the shares are from.
        back: what a backward pass reaches of the share of a forward one.
    """

    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    source: str
    back: float = 1.0

    def __call__(self, length: Floats) -> Floats:
        """The share at lengths; below one tile of the first length in proportion to it."""
        known = np.interp(np.log(np.maximum(length, 1e-9)), np.log(self.lengths), self.shares)
        return known * np.clip(length / self.lengths[0], 1e-3, 1)


# Assumed: FlashAttention-3 reaches .55 to .65 of an H100's peak forward, and a tile of 64 to 128 tokens that is partly
# filled takes as long as a full one. benchmarks/parallel_efficiency.py measures the curve of a device.
ASSUMED = Efficiency(
    (64, 128, 256, 512, 1024, 2048, 4096, 8192), (0.2, 0.35, 0.44, 0.51, 0.56, 0.59, 0.61, 0.62), "assumed"
)


@dataclass(frozen=True)
class Prediction:
    """Modelled seconds of each process.

    Attributes:
        forward, backward: ``[ranks]``.
    """

    forward: Floats
    backward: Floats

    def slowest(self, backward: bool = True) -> float:
        """Of all processes, in seconds; that of both passes, or of the forward alone."""
        return float((self.forward + self.backward if backward else self.forward).max())


def predict(counts: Counts, cluster: Cluster, efficiency: Efficiency = ASSUMED) -> Prediction:
    """What attention takes that was counted by :func:`._counts.count`."""
    tiles = counts.tiles(efficiency)
    return Prediction(*(_Pass(counts, cluster, efficiency, tiles, back).seconds() for back in (False, True)))


@dataclass(frozen=True)
class _Pass:
    """One way, forward or back."""

    counts: Counts
    cluster: Cluster
    efficiency: Efficiency
    tiles: Floats
    back: bool

    def seconds(self) -> Floats:
        among = sum((self._shared(name) for name in self._named("all-to-all")), np.zeros(self.counts.ranks))
        work = {"ring": self._ring, "all_gather": self._all_gather, "group_cast": self._group_cast}
        return among + work[self.counts.exchange]()

    def _named(self, name: str) -> tuple[str, ...]:
        """The exchange of that name, where there is one."""
        name += ", back" if self.back else ""
        return (name,) if name in self.counts.sent(self.back) else ()

    def _computing(self, pairs: Ints) -> Floats:
        """Seconds of each process for pairs of each context.

        A piece is as long as a run of queries, or as the keys that a query sees in the mean where these are fewer.
        """
        counts, rows = self.counts, np.maximum(self.counts.rows, 1)
        share = np.minimum(self.tiles, self.efficiency(pairs / rows))
        flops = pairs * counts.flops_of_pair * (BACKWARD / self.efficiency.back if self.back else 1.0)
        each: Floats = flops / (self.cluster.flops * share) + self.cluster.launch * (pairs > 0)
        return each[counts.context_of]

    def _shared(self, name: str) -> Floats:
        """Seconds of an all-to-all, uneven or not: each device's own link to other machines, and to its own machine."""
        sent = self.counts.sent(self.back)[name]
        machine = np.arange(len(sent)) // self.cluster.node
        near = machine[:, None] == machine
        found = np.zeros(len(sent))
        for link, where in ((self.cluster.within, near), (self.cluster.between, ~near)):
            size = sent * where
            found = np.maximum(found, np.maximum(size.sum(0), size.sum(1)) / link.bandwidth)
        messages = (sent > 0) & ~np.eye(len(sent), dtype=bool)
        latency = np.where(near, self.cluster.within.latency, self.cluster.between.latency)
        shared: Floats = found + (messages * latency).sum(1)
        return shared

    def _hop(self, blocks: Ints, to: Ints, size: int) -> Floats:
        """Seconds in which each process sends rows of a context's block to another's, and receives such."""
        counts = self.counts
        target = counts.grid[to[counts.context_of], counts.head_of]
        apart = target // self.cluster.node != np.arange(counts.ranks) // self.cluster.node
        links = (self.cluster.within, self.cluster.between)
        latency, bandwidth = (np.where(apart, *(getattr(x, y) for x in links[::-1])) for y in ("latency", "bandwidth"))
        going = latency + counts.rows[blocks][counts.context_of] * size / bandwidth
        going = np.where(target == np.arange(counts.ranks), 0.0, going)
        coming = np.zeros_like(going)
        coming[target] = going
        hop: Floats = np.maximum(going, coming)
        return hop

    def _ring(self) -> Floats:
        counts, me = self.counts, np.arange(len(self.counts.rows))
        ring = counts.window, len(me) // counts.window
        inner_to, outer_to = steps_away(me, *ring, 0, 1), steps_away(me, *ring, 1, 0)
        total = np.zeros(counts.ranks)
        for outer in range(ring[1]):
            held = np.zeros(counts.ranks)
            for inner in range(ring[0]):
                block = steps_away(me, *ring, -outer, -inner)
                going = self._hop(block, inner_to, counts.row_bytes) if inner < ring[0] - 1 else 0.0
                held += np.maximum(self._computing(counts.pairs[me, block]), going)
                held += self._hop(block, inner_to, counts.wide_bytes) if self.back else 0.0
            first = steps_away(me, *ring, -outer, 0)
            held = np.maximum(held, self._hop(first, outer_to, counts.row_bytes) if outer < ring[1] - 1 else 0.0)
            total += held + (self._hop(first, outer_to, counts.wide_bytes) if self.back else 0.0)
        return total

    def _all_gather(self) -> Floats:
        """A machine's blocks enter another one once, over the links of all of a group's devices there."""
        counts, n = self.counts, len(self.counts.rows)
        size = int(counts.rows.max()) * counts.row_bytes
        machines = counts.grid // self.cluster.node  # of contexts and heads
        found = np.zeros(counts.ranks)
        for head in range(machines.shape[1]):
            here = (machines[:, head, None] == machines[None, :, head]).sum(1)  # of the group, on each one's machine
            moved = np.maximum(
                (n - here) * size / here / self.cluster.between.bandwidth,
                (n - 1) * size / self.cluster.within.bandwidth,
            )
            apart = n / here - 1
            latency = apart * self.cluster.between.latency + (n - 1 - apart) * self.cluster.within.latency
            found[counts.grid[:, head]] = moved + latency
        found += self._computing(counts.pairs.sum(1))
        return found + (self._shared("all-gather, gradients") if self.back else 0.0)

    def _group_cast(self) -> Floats:
        pairs = self.counts.pairs
        own = pairs.diagonal()
        (name,) = self._named("group-cast")
        found = np.maximum(self._computing(own), self._shared(name)) + self._computing(pairs.sum(1) - own)
        return found + (self._shared("group-cast, gradients") if self.back else 0.0)
