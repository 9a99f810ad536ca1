# SPDX-License-Identifier: Apache-2.0
"""Published ways to share attention among processes, each a choice of layout, exchange and grid.

The Long-Context Attention Benchmark (arXiv 2510.17896) compares the first five, all with its one layout, a zigzag
within each document, which it pads to a multiple of twice the processes; here nothing is padded. ``group_cast`` is
MagiAttention's exchange over the layout that :mod:`._layouts` searches for, ``group_cast_2d`` the same where heads are
shared too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import UserError

__all__ = ["METHODS", "Method", "method"]


@dataclass(frozen=True)
class Method:
    """A way to share attention.

    Attributes:
        layout, exchange: names.
        heads: who shares heads: ``none``, ``some`` processes, as many as ``kv`` heads allow, or ``all``.
        windows: whether a ring has two levels, the inner one as large as can be up to the root of the processes.
    """

    layout: str
    exchange: str
    heads: str = "none"
    windows: bool = False

    def given(self, ranks: int, node: int, kv_heads: int) -> dict[str, Any]:
        """Arguments of :class:`.ContextParallel` for so many processes.

        Args:
            ranks: processes.
            node: of a machine; 0 where all are on one.
            kv_heads: heads of keys.
        """
        # USP and LoongTrain share heads within a machine; on one machine the grid is as square as can be.
        some = math.gcd(ranks, node) if node > 1 else _divisor(ranks, math.isqrt(ranks))
        heads = {"none": 1, "some": some, "kv": _divisor(math.gcd(some, kv_heads), some), "all": ranks}[self.heads]
        found = {"layout": self.layout, "exchange": self.exchange, "heads": heads}
        ring = ranks // heads
        return found | ({"window": _divisor(ring, math.isqrt(ring))} if self.windows else {})


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``."""
    return max(n for n in range(1, max(1, most) + 1) if number % n == 0)


METHODS: Mapping[str, Method] = MappingProxyType({
    "ulysses": Method("contiguous", "all_gather", "all"),
    "ring": Method("document", "ring"),
    "all_gather": Method("document", "all_gather"),
    "usp": Method("document", "ring", "some"),
    "loongtrain": Method("document", "ring", "some", windows=True),
    "double_ring": Method("document", "ring", windows=True),
    "group_cast": Method("greedy", "group_cast"),
    "group_cast_2d": Method("greedy", "group_cast", "kv"),
})  # fmt: skip


def method(name: str) -> Method:
    """A method by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
