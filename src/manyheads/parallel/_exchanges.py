# SPDX-License-Identifier: Apache-2.0
"""How the keys and values of a group of processes come to each of them, and their gradients back to their owners.

An exchange visits blocks: ``(tokens, kv)``, the next of which is on its way while one is worked on. On the way back the
blocks are visited once more, and what each process finds for a block goes to the block's owner.

    Ring        W - 1 steps; each process passes on what it had from the one before. ``window``: two rings, as
                LoongTrain has them: within windows of so many processes, while the blocks that a window began with go
                on to the next window
    AllGather   all at once
    GroupCast   only rows that a process needs, straight from their owners, as MagiAttention has it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention.tile_pattern import TilePattern
from ..errors import UserError
from ._masks import AttnMask
from ._peers import Arriving, Peers
from ._tiles import tiles

__all__ = ["AllGather", "Exchange", "GroupCast", "Ring", "steps_away"]

Block = tuple[Tensor, Tensor]
Gradient = Callable[[Tensor, Tensor], Tensor]


class Exchange(ABC):
    """Base of all exchanges.

    Attributes:
        peers: the processes.
        rows: tokens of each, int64.
    """

    def __init__(self, peers: Peers, rows: Sequence[Tensor], mask: AttnMask) -> None:
        self.peers, self.rows, self.mask = peers, tuple(rows), mask
        self._tiles: dict[tuple[int, torch.device], tuple[Tensor, TilePattern]] = {}
        self._places: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def mine(self) -> Tensor:
        """Tokens of this process."""
        return self.rows[self.peers.rank]

    @abstractmethod
    def visit(self, kv: Tensor) -> Iterator[Block]:
        """Blocks of all tokens that a row of this process may see, its own ``kv [T, ...]`` among them, each once."""

    @abstractmethod
    def back(self, kv: Tensor, gradient: Gradient) -> Tensor:
        """Visit again; the sum over all processes of ``gradient(tokens, kv)`` for the rows of this one."""

    def tiles(self, step: int, tokens: Tensor, device: torch.device) -> TilePattern:
        """What the rows of this process see of the block of a step, made once for a step and a device."""
        key = step, device
        if key not in self._tiles or not (self._tiles[key][0] is tokens or torch.equal(self._tiles[key][0], tokens)):
            self._tiles[key] = tokens, tiles(self.mask, self.mine, tokens, device)
        return self._tiles[key][1]

    def _there(self, name: str, places: Tensor, device: torch.device) -> Tensor:
        """Places on a device, moved there once."""
        if (name, device) not in self._places:
            self._places[name, device] = places.to(device)
        return self._places[name, device]

    def _lengths(self) -> list[int]:
        return [len(rows) for rows in self.rows]


Place = TypeVar("Place", int, NDArray[np.int64])


def steps_away(rank: Place, window: int, windows: int, outer: int, inner: int) -> Place:
    """Process so many windows, and so many places within its window, behind ``rank`` in two rings."""
    mine, place = rank // window, rank % window
    return (mine + outer) % windows * window + (place + inner) % window


class Ring(Exchange):
    """Blocks go round, in two rings where windows are smaller than the group."""

    def __init__(self, peers: Peers, rows: Sequence[Tensor], mask: AttnMask, window: int | None = None) -> None:
        super().__init__(peers, rows, mask)
        self.window = window or len(peers)
        if len(peers) % self.window:
            raise UserError(f"{len(peers)} processes of a ring do not divide into windows of {self.window}")
        self.windows = len(peers) // self.window

    def visit(self, kv: Tensor) -> Iterator[Block]:
        entry = kv
        for outer in range(self.windows):
            last = outer == self.windows - 1
            coming = None if last else self._pass_on(entry, outer + 1, 0, "ring between windows", to=(1, 0))
            held = entry
            for inner in range(self.window):
                ends = inner == self.window - 1
                arriving = None if ends else self._pass_on(held, outer, inner + 1, "ring", to=(0, 1))
                yield self.rows[self._source(outer, inner)], held
                held = held if arriving is None else arriving.wait()
            entry = entry if coming is None else coming.wait()

    def back(self, kv: Tensor, gradient: Gradient) -> Tensor:
        """Gradients travel with their blocks, and one step further home."""
        entry, total = kv, Arriving(kv, kv, ())  # no sum yet
        for outer in range(self.windows):
            last = outer == self.windows - 1
            coming = None if last else self._pass_on(entry, outer + 1, 0, "ring between windows, back", to=(1, 0))
            held = entry
            for inner in range(self.window):
                ends = inner == self.window - 1
                arriving = None if ends else self._pass_on(held, outer, inner + 1, "ring, back", to=(0, 1))
                found = gradient(self.rows[self._source(outer, inner)], held)  # the others' sum is on its way meanwhile
                found = found.add_(total.wait()) if outer or inner else found
                total = self._pass_on(found, outer, inner + 1, "ring, gradients", to=(0, 1))
                held = held if arriving is None else arriving.wait()
            total = self._pass_on(total.wait(), outer + 1, 0, "ring between windows, gradients", to=(1, 0))
            entry = entry if coming is None else coming.wait()
        return total.wait()

    def _source(self, outer: int, inner: int) -> int:
        """Whose block this process works on."""
        return steps_away(self.peers.rank, self.window, self.windows, -outer, -inner)

    def _pass_on(self, x: Tensor, outer: int, inner: int, name: str, to: tuple[int, int]) -> Arriving:
        """Send ``x`` so many windows and places on; what arrives is the block of a later step."""
        on, back = (
            steps_away(self.peers.rank, self.window, self.windows, sign * to[0], sign * to[1]) for sign in (1, -1)
        )
        length = len(self.rows[self._source(outer, inner)])
        return self.peers.shift(x, (length, *x.shape[1:]), on, back, name)


class AllGather(Exchange):
    """All keys at once; gradients go straight to their owners, who add them."""

    def __init__(self, peers: Peers, rows: Sequence[Tensor], mask: AttnMask) -> None:
        super().__init__(peers, rows, mask)
        self._every = torch.cat(self.rows)

    def visit(self, kv: Tensor) -> Iterator[Block]:
        yield self._every, self.peers.all_gather(kv, self._lengths(), "all-gather")

    def back(self, kv: Tensor, gradient: Gradient) -> Tensor:
        every = self.peers.all_gather(kv, self._lengths(), "all-gather, back")
        parts = gradient(self._every, every).split(self._lengths())
        found = self.peers.all_to_all(parts, [len(kv)] * len(self.peers), "all-gather, gradients").wait()
        total: Tensor = found.unflatten(0, (len(self.peers), len(kv))).sum(0)
        return total


class GroupCast(Exchange):
    """Rows that are needed, and no others."""

    def __init__(self, peers: Peers, rows: Sequence[Tensor], mask: AttnMask) -> None:
        super().__init__(peers, rows, mask)
        me = peers.rank
        needs = [mask.needs(each) for each in self.rows]
        nothing = self.mine[:0]
        self.sent = [
            nothing if to == me else needs[to][self.mine].nonzero()[:, 0] for to in range(len(peers))
        ]  # places among the rows of this process
        self.asked = [nothing if of == me else each[needs[me][each]] for of, each in enumerate(self.rows)]
        self._asked, self._sent = torch.cat(self.asked), torch.cat(self.sent)

    def _cast(self, kv: Tensor, name: str) -> Arriving:
        parts = kv[self._there("sent", self._sent, kv.device)].split(list(map(len, self.sent)))
        return self.peers.all_to_all(parts, list(map(len, self.asked)), name)

    def visit(self, kv: Tensor) -> Iterator[Block]:
        arriving = self._cast(kv, "group-cast")
        yield self.mine, kv
        yield self._asked, arriving.wait()

    def back(self, kv: Tensor, gradient: Gradient) -> Tensor:
        arriving = self._cast(kv, "group-cast, back")
        total = gradient(self.mine, kv)
        parts = gradient(self._asked, arriving.wait()).split(list(map(len, self.asked)))
        found = self.peers.all_to_all(parts, list(map(len, self.sent)), "group-cast, gradients").wait()
        return total.index_add(0, self._there("sent", self._sent, kv.device), found)
