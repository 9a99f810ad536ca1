# SPDX-License-Identifier: Apache-2.0
"""Collectives that gradients go back through, and rows that travel while something else is computed.

    trip = Trip(rows, peers, sent, received, "tokens")   # they leave
    ...                                                  # whatever needs none of them
    rows = trip.arrive()

On the way back the gradients leave where the rows arrived, and are waited for where the rows left; the engine of
autograd runs the gradients of what was computed in between meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._peers import Arriving, Peers

__all__ = ["Trip", "gather", "reduce_scatter"]


class Trip:
    """An all-to-all of rows ``x [R, ...]``: so many to each process, so many from each."""

    def __init__(self, x: Tensor, peers: Peers, sent: Sequence[int], received: Sequence[int], name: str) -> None:
        self.peers, self.sent, self.received, self.name = peers, sent, received, name
        self.coming: Arriving | None = None
        self._into: Tensor = _Leave.apply(x, self)  # type: ignore[no-untyped-call]

    def arrive(self) -> Tensor:
        """Rows of all processes, one behind the other."""
        found: Tensor = _Arrive.apply(self._into, self)  # type: ignore[no-untyped-call]
        del self._into  # else the graph, which knows the trip, would hold what arrived
        return found

    def start(self, x: Tensor, back: bool) -> Arriving:
        """Rows leave, or gradients on the way back."""
        ways, name = (self.sent, self.received), self.name
        self.coming = self.peers.exchange(x, *(ways[::-1] if back else ways), f"{name}, back" if back else name)
        return self.coming

    def end(self) -> Tensor:
        """What was under way."""
        assert self.coming is not None
        found, self.coming = self.coming.wait(), None
        return found


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.start(x, False)._into  # filled when the trip ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.end(), None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, into: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        found = trip.end()
        return found.view_as(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.trip.start(dx, True)
        return dx, None  # stands in for what is under way


class _Rows(Function):
    """One of an all-gather and a reduce-scatter of rows, and the other for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, lengths: Sequence[int], name: str, gathers: bool) -> Tensor:
        ctx.given = peers, lengths, f"{name}, back", not gathers
        return (peers.all_gather if gathers else peers.reduce_scatter)(x, lengths, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        peers, lengths, name, gathers = ctx.given
        return (peers.all_gather if gathers else peers.reduce_scatter)(dx, lengths, name), None, None, None, None


def gather(x: Tensor, peers: Peers, lengths: Sequence[int], name: str) -> Tensor:
    """Rows of all processes, of these lengths; each gets the sum of the gradients of its own."""
    found: Tensor = _Rows.apply(x, peers, lengths, name, True)  # type: ignore[no-untyped-call]
    return found


def reduce_scatter(x: Tensor, peers: Peers, lengths: Sequence[int], name: str) -> Tensor:
    """The sum over the processes of this one's rows, of those of all in ``x``."""
    found: Tensor = _Rows.apply(x, peers, lengths, name, False)  # type: ignore[no-untyped-call]
    return found
