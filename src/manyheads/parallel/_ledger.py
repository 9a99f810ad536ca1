# SPDX-License-Identifier: Apache-2.0
"""What a process sends to which other, counted at the calls that send it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Bytes that this process has sent, by kind of exchange and receiver; what it keeps for itself is not counted.

    Attributes:
        rank: of this process among all.
        node: processes of a machine, whose ranks follow each other; 0 where all are on one.
        sent: bytes by ``(exchange, receiver)``.
    """

    rank: int
    node: int = 0
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, name: str, to: dict[int, int]) -> None:
        """One exchange: bytes by receiver, each a rank among all."""
        for receiver, size in to.items():
            if receiver != self.rank and size:
                self.sent[name, receiver] += size

    def bytes(self, name: str | None = None, *, between: bool | None = None) -> int:
        """Bytes of an exchange, or of all; ``between`` machines only, or within this one's only."""
        return sum(
            size
            for (kind, to), size in self.sent.items()
            if name in (None, kind) and between in (None, self._apart(to))
        )

    def _apart(self, to: int) -> bool:
        return bool(self.node) and to // self.node != self.rank // self.node

    def clear(self) -> None:
        """Count from nothing."""
        self.sent.clear()
