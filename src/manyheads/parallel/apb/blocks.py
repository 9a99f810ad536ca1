# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt each host has, what it passes on, and what that costs.

A prompt of n tokens is a document and a query of l_q tokens behind it. Hosts have blocks of the document, one behind
the other, whose lengths differ by one at most; all have the query. The anchor is what hosts after the first one put in
front of their block: a few first tokens of the document, the query, and more of the document.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import Tensor

from ...attention.budget import as_budget, keep_limit

__all__ = ["Blocks", "Part"]


def _part(value: object) -> int | float:
    return 0 if value in (0, "0", "0.0") else as_budget(value)


Part = Annotated[int | float, BeforeValidator(_part)]  # tokens, or a fraction of a block


@dataclass(frozen=True)
class Blocks:
    """A prompt in blocks.

    Attributes:
        bounds: first token of each host's block, and the one behind its last.
        length: n.
        anchored: document tokens in the anchor, the first of all; 0 for no anchor.
        asked: whether the query stands in the anchor.
        sinks: document tokens before it there.
        counts: l_p of each host: tokens that each of its key/value heads passes on; none of the last.
    """

    bounds: tuple[tuple[int, int], ...]
    length: int
    anchored: int
    asked: bool
    sinks: int
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, length: int, hosts: int, query: int, anchor: int | float, passed: int | float, asked: bool = True,
        sinks: int = 16,
    ) -> Blocks:  # fmt: skip
        """Blocks of a prompt.

        Args:
            length: n.
            hosts: H.
            query: l_q, or as many as leave each host a token.
            anchor: document tokens in the anchor, or a fraction of the longest block; at most that block.
            passed: tokens that a head passes on, or a fraction of each block.
            asked, sinks: as the attributes.
        """
        each, more = divmod(max(length - query, min(length, hosts)), hosts)
        starts = [host * each + min(host, more) for host in range(hosts + 1)]
        bounds = tuple(pairwise(starts))
        anchored = keep_limit(anchor, starts[1]) if hosts > 1 else 0
        sizes = [stop - start for start, stop in bounds]
        # What stands in every anchor is not passed on, and nobody comes after the last host.
        counts = [min(keep_limit(passed, n), n - (0 if host else anchored)) for host, n in enumerate(sizes[:-1])] + [0]
        return cls(bounds, length, anchored, asked, min(sinks, anchored), tuple(counts))

    @property
    def hosts(self) -> int:
        """H."""
        return len(self.bounds)

    @property
    def document(self) -> int:
        """Tokens before the query."""
        return self.bounds[-1][1]

    @property
    def query(self) -> int:
        """l_q."""
        return self.length - self.document

    @property
    def anchor(self) -> Tensor:
        """Tokens of the anchor by their place in the prompt, int64; none without one."""
        if not self.anchored:
            return torch.arange(0)
        asked = torch.arange(self.document, self.length if self.asked else self.document)
        return torch.cat([torch.arange(self.sinks), asked, torch.arange(self.sinks, self.anchored)])

    def size(self, host: int) -> int:
        """Tokens of a host's block."""
        start, stop = self.bounds[host]
        return stop - start

    def barred(self, host: int) -> int:
        """First tokens of a host's block that it does not pass on."""
        return 0 if host else self.anchored

    def before(self, host: int) -> int:
        """Tokens that a head of a host gets from those before it."""
        return sum(self.counts[:host])

    def sent(self, host: int, kv: int, asked: int, part: int) -> int:
        """Bytes that a host sends in one layer; an all-gather pads to the longest passing block.

        Args:
            host: by number.
            kv: bytes of a token's keys and values of all heads, ``B Hkv (d + dv)`` numbers.
            asked: of a token's queries, ``B H d`` numbers.
            part: of a token's output and log-sum-exp, ``B H (dv + 1)`` numbers of float32.
        """
        last = host == self.hosts - 1
        return (self.hosts - 1) * max(self.counts) * kv + self.query * ((self.hosts - 1) * asked if last else part)

    def received(self, host: int, kv: int, asked: int, part: int) -> int:
        """Bytes that it receives in one layer."""
        last = host == self.hosts - 1
        return (self.hosts - 1) * max(self.counts) * kv + self.query * ((self.hosts - 1) * part if last else asked)

    def ring(self, kv: int) -> int:
        """Bytes that a host of a ring receives in one layer, where the query is shared too."""
        return (self.hosts - 1) * -(-self.length // self.hosts) * kv

    def pairs(self, host: int) -> int:
        """Queries times keys that they see, in one head of a host: its anchor, its block, and its part of the query."""
        first, size, last = len(self.anchor) if host else 0, self.size(host), host == self.hosts - 1
        own = _triangle(first) + size * (first + self.before(host)) + _triangle(size)
        return own + self.query * size + (_triangle(self.query) if last else 0)

    @staticmethod
    def causal(length: int) -> int:
        """The same of causal attention in one process."""
        return _triangle(length)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
