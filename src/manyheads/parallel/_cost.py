# SPDX-License-Identifier: Apache-2.0
"""What an exchange takes by the alpha-beta model: each message a latency, each byte its share of a link's bandwidth.

All times are seconds, all sizes bytes. Everything here is *modelled*: what was measured stands in results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CLUSTERS", "Cluster", "Link", "all_gather", "all_to_all", "best_pieces", "chain", "doubling"]


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
    """

    within: Link
    between: Link
    node: int
    flops: float

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
