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
        padded = x if len(x) == longest else torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        every = x.new_empty(len(self) * longest, *x.shape[1:])
        _all_gather(every, padded.contiguous(), group=self.group)
        self.ledger.add(name, dict.fromkeys(self.ranks, padded.nbytes))
        return torch.cat([part[:n] for part, n in zip(every.split(longest), lengths, strict=True)])

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int], name: str) -> Arriving:
        """Send a part to each process; those that come stand one behind the other, of these lengths."""
        sent = torch.cat(list(parts))
        into = sent.new_empty(sum(lengths), *sent.shape[1:])
        work = dist.all_to_all_single(into, sent, list(lengths), list(map(len, parts)), group=self.group, async_op=True)
        self.ledger.add(name, {to: part.nbytes for to, part in zip(self.ranks, parts, strict=True)})
        return Arriving(into, sent, (work,))
