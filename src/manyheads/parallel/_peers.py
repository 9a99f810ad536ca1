# SPDX-License-Identifier: Apache-2.0
"""A group of processes, and the few collectives that context parallelism is made of; each is counted in a ledger.

All take tensors whose sizes every process of the group knows beforehand, so that nothing is asked first. Sizes may
differ between processes: an all-gather pads to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ._ledger import Ledger

__all__ = ["Arriving", "Peers"]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the new name, from 2.13 on
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Arriving:
    """A tensor that is on its way."""

    _into: Tensor
    _sent: Tensor  # lives until it has gone
    _works: Sequence[dist.Work]

    def wait(self) -> Tensor:
        """The tensor."""
        for work in self._works:
            work.wait()
        return self._into


class Peers:
    """The processes of a group.

    Attributes:
        group: None for all processes.
        ranks: of the group's processes among all, in the group's order.
        rank: of this process in the group.
        ledger: that counts what this process sends.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None, ledger: Ledger) -> None:
        self.ranks, self.group, self.ledger = tuple(ranks), group, ledger
        self.rank = self.ranks.index(ledger.rank)

    def __len__(self) -> int:
        return len(self.ranks)

    def shift(self, x: Tensor, shape: Sequence[int], to: int, source: int, name: str) -> Arriving:
        """Send ``x`` to process ``to`` of the group, and receive what has ``shape`` from ``source``."""
        x = x.contiguous()
        if to == self.rank:
            return Arriving(x, x, ())
        into = x.new_empty(tuple(shape))
        calls = [
            dist.P2POp(dist.isend, x, self.ranks[to], self.group),
            dist.P2POp(dist.irecv, into, self.ranks[source], self.group),
        ]
        works = dist.batch_isend_irecv(calls)
        self.ledger.add(name, {self.ranks[to]: x.nbytes})
        return Arriving(into, x, works)

    def all_gather(self, x: Tensor, lengths: Sequence[int], name: str) -> Tensor:
        """The tensors of all processes, one behind the other, whose first dimension has these lengths."""
        longest = max(lengths)
        padded = x if len(x) == longest else _padded(x, longest)
        every = x.new_empty(len(self) * longest, *x.shape[1:])
        _all_gather(every, padded.contiguous(), group=self.group)
        self.ledger.add(name, dict.fromkeys(self.ranks, padded.nbytes))
        return torch.cat([part[:n] for part, n in zip(every.split(longest), lengths, strict=True)])

    def reduce_scatter(self, x: Tensor, lengths: Sequence[int], name: str) -> Tensor:
        """The sum over all processes of the rows of this one; ``x`` has those of all, of these lengths, one behind
        the other.
        """
        longest, mine = max(lengths), lengths[self.rank]
        parts = [part if len(part) == longest else _padded(part, longest) for part in x.split(list(lengths))]
        into = x.new_empty(longest, *x.shape[1:])
        _reduce_scatter(into, (x if min(lengths) == longest else torch.cat(parts)).contiguous(), group=self.group)
        self.ledger.add(name, dict.fromkeys(self.ranks, into.nbytes))
        return into[:mine]

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int], name: str) -> Arriving:
        """Send a part to each process; those that come stand one behind the other, of these lengths."""
        return self.exchange(torch.cat(list(parts)), list(map(len, parts)), lengths, name)

    def exchange(self, x: Tensor, sent: Sequence[int], lengths: Sequence[int], name: str) -> Arriving:
        """The same of parts that stand one behind the other, so many rows for each process."""
        x = x.contiguous()
        into = x.new_empty(sum(lengths), *x.shape[1:])
        work = dist.all_to_all_single(into, x, list(lengths), list(sent), group=self.group, async_op=True)
        row = x[:1].nbytes if len(x) else 0
        self.ledger.add(name, {to: rows * row for to, rows in zip(self.ranks, sent, strict=True)})
        return Arriving(into, x, (work,))


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])
