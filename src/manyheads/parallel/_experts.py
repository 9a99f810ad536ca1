# SPDX-License-Identifier: Apache-2.0
"""Experts that processes share: how tokens come to the experts that they chose, and their outputs back.

    experts = ExpertParallel(world, 8, top_k=2)           # this process has experts[experts.mine]
    out = experts(x, index, weight, feed_forward(gate_up[experts.mine], down[experts.mine]))

Three ways, which give the same: ``all_to_all`` sends a row for every expert that a token chose, ``dedupe`` one for
every process that has some of them (which adds their outputs before it sends them back), ``all_gather`` all tokens to
all processes, each of which picks what its experts were chosen for; a reduce-scatter brings the sums back. Tokens are
sorted by expert, those of an expert by the process that they come from. Weights of the router multiply what enters the
last matrix of an expert, so that outputs are only added. Nothing is dropped, however uneven the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..errors import UserError
from ._compressed import Format, summed_rows
from ._context import World
from ._travel import Trip, gather, reduce_scatter

__all__ = [
    "DISPATCHES", "Dispatch", "ExpertParallel", "FeedForward", "Route", "Sorted", "balance_loss", "feed_forward",
    "gated", "grouped",
]  # fmt: skip

Dispatch = Literal["all_to_all", "dedupe", "all_gather"]
DISPATCHES: tuple[Dispatch, ...] = ("all_to_all", "dedupe", "all_gather")
FeedForward = Callable[["Sorted"], Tensor]


class Sorted(NamedTuple):
    """What the experts of a process are given.

    Attributes:
        x: ``[m, D]``, rows of one expert behind those of the one before.
        weight: ``[m]`` of the router.
        counts: rows of each expert of this process.
    """

    x: Tensor
    weight: Tensor
    counts: list[int]


class Route(NamedTuple):
    """Tokens on their way to experts.

    Attributes:
        arrive: what the experts of this process are given; once.
        home: their outputs ``[m, D]``, times weights -> sums ``[T, D]`` of this process's tokens.
    """

    arrive: Callable[[], Sorted]
    home: Callable[[Tensor], Tensor]


def grouped(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """``[m, D]`` times the weights ``[E, N, D]`` of the expert of each row, in runs of ``counts``: ``[m, N]``."""
    return torch.cat([F.linear(part, each) for part, each in zip(x.split(list(counts)), weights, strict=True)])


def gated(x: Tensor, weight: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """Gates and values ``[m, 2 I]``, times weights ``[m]`` -> ``[m, I]`` in the dtype of ``x``."""
    gate, up = x.chunk(2, -1)
    return (act(gate) * up * weight[:, None]).to(x.dtype)


def feed_forward(gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> FeedForward:
    """Gated feed-forward layers of the experts of a process, one after the other.

    Args:
        gate_up: ``[E, 2 I, D]``, gates first.
        down: ``[E, D, I]``.
        act: of the gates.
    """

    def compute(rows: Sorted) -> Tensor:
        return grouped(gated(grouped(rows.x, gate_up, rows.counts), rows.weight, act), down, rows.counts)

    return compute


class ExpertParallel:
    """Experts shared by all processes of a world, in runs of consecutive ones.

    Attributes:
        mine: experts of this process.
        first: of each process, and behind them the number of all.
        dispatch: the way that is taken.
    """

    def __init__(
        self, world: World, experts: int, top_k: int, dispatch: Dispatch, sums: Format | None = None
    ) -> None:  # fmt: skip
        """Share experts out; every process in the same way.

        Args:
            world: of processes.
            experts: of a layer.
            top_k: of a token.
            dispatch: one of ``DISPATCHES``, see :func:`manyheads.parallel.choose_dispatch`.
            sums: what the sums of ``all_gather`` are sent as, to be added in float32 where they arrive; None for the
                backend's own reduce-scatter.

        Raises:
            UserError: fewer experts than processes, no such dispatch, or sums of another than ``all_gather``.
        """
        if sums is not None and dispatch != "all_gather":
            raise UserError(f"{dispatch} sends outputs and no sums: use dispatch=all_gather where sums={sums}")
        if experts < world.size:
            raise UserError(f"{experts} experts cannot be shared by {world.size} processes: use fewer processes")
        if dispatch not in DISPATCHES:
            raise UserError(f"there is no dispatch {dispatch!r}; there are {', '.join(DISPATCHES)}")
        self.peers = world.peers()
        self.experts, self.top_k, self.dispatch, self.sums = experts, top_k, dispatch, sums
        self.first = [experts * rank // world.size for rank in range(world.size + 1)]
        self.mine = slice(self.first[world.rank], self.first[world.rank + 1])

    def __call__(
        self, x: Tensor, index: Tensor, weight: Tensor, compute: FeedForward,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Sum over the chosen experts of a token, ``[T, D]`` in the dtype of ``x``.

        Args:
            x, index, weight: as for :meth:`send`.
            compute: the experts of this process: rows -> outputs times weights, ``[m, D]``; see :func:`feed_forward`.
            meanwhile: computed while tokens travel and added to the outputs, ``[T, D]``: a shared expert, as a rule.
        """
        route = self.send(x, index, weight)
        beside = None if meanwhile is None else meanwhile()
        out = route.home(compute(route.arrive()))
        return out if beside is None else out + beside

    def mixture(
        self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The same with the weights of all experts at hand, see :class:`manyheads.parallelism.SharedExperts`."""

        def compute(rows: Sorted) -> Tensor:
            inner = gate(grouped(rows.x, gate_up[self.mine], rows.counts)) * rows.weight[:, None]
            return grouped(inner.to(rows.x.dtype), down[self.mine], rows.counts)

        return self(x, index, weight, compute)

    def send(self, x: Tensor, index: Tensor, weight: Tensor) -> Route:
        """Send tokens to the experts that they chose; what needs none of them can be computed until they arrive.

        Args:
            x: ``[T, D]``, the tokens of this process; T may differ between processes.
            index: ``[T, k]`` int64, experts that each chose, none twice.
            weight: ``[T, k]`` of the router.

        Raises:
            UserError: other numbers of tokens or choices.
        """
        if index.shape != (len(x), self.top_k) or weight.shape != index.shape:
            raise UserError(f"{len(x)} tokens choose {self.top_k} experts each, not {tuple(index.shape)}")
        ways = {"all_to_all": self._all_to_all, "dedupe": self._dedupe, "all_gather": self._all_gather}
        return ways[self.dispatch](x, index, weight)

    def _asked(self, counts: Tensor) -> Tensor:
        """``counts`` of every process, int64 on the CPU, a row each."""
        return self.peers.all_gather(counts[None], [1] * len(self.peers), "counts").cpu()

    def _all_to_all(self, x: Tensor, index: Tensor, weight: Tensor) -> Route:
        """A row for each expert that a token chose."""
        order = index.flatten().argsort(stable=True)
        every = self._asked(index.flatten().bincount(minlength=self.experts))
        own = every[:, self.mine]  # [source, expert]: rows come by source, then expert
        sent = [int(part.sum()) for part in every[self.peers.rank].split(_sizes(self.first))]
        received = own.sum(1).tolist()
        rows = Trip(x[order // self.top_k], self.peers, sent, received, "tokens")
        weights = Trip(weight.flatten()[order], self.peers, sent, received, "weights")
        local = torch.arange(own.shape[1]).repeat(len(own)).repeat_interleave(own.flatten())
        place = local.argsort(stable=True).to(x.device)

        def arrive() -> Sorted:
            return Sorted(rows.arrive()[place], weights.arrive()[place], own.sum(0).tolist())

        def home(y: Tensor) -> Tensor:
            back = Trip(y[_inverse(place)], self.peers, received, sent, "outputs").arrive()
            out: Tensor = back[_inverse(order)].unflatten(0, index.shape).sum(1)
            return out

        return Route(arrive, home)

    def _dedupe(self, x: Tensor, index: Tensor, weight: Tensor) -> Route:
        """A row for each process that has experts which a token chose, and with it all its choices."""
        starts = torch.tensor(self.first[1:-1], device=index.device)
        to = torch.zeros(len(x), len(self.peers), dtype=torch.bool, device=x.device)
        to.scatter_(1, torch.bucketize(index, starts, right=True), True)
        token = to.T.nonzero()[:, 1]  # by process, then token
        every = self._asked(to.sum(0))
        sent, received = every[self.peers.rank].tolist(), every[:, self.peers.rank].tolist()
        rows = Trip(x[token], self.peers, sent, received, "tokens")
        weights = Trip(weight[token], self.peers, sent, received, "weights")
        chosen = self.peers.exchange(index[token].int(), sent, received, "choices")
        row: list[Tensor] = []

        def arrive() -> Sorted:
            found, at = self._chosen(rows.arrive(), chosen.wait(), weights.arrive())
            row.append(at)
            return found

        def home(y: Tensor) -> Tensor:
            partial = _summed(y, row[0], sum(received))
            back = Trip(partial, self.peers, received, sent, "outputs").arrive()
            return _summed(back, token, len(x))

        return Route(arrive, home)

    def _all_gather(self, x: Tensor, index: Tensor, weight: Tensor) -> Route:
        """All tokens to all processes, and sums of outputs back to where each token is."""
        lengths = self._asked(torch.tensor([len(x)], device=x.device))[:, 0].tolist()
        chosen = self.peers.all_gather(index.int(), lengths, "choices")
        weights = gather(weight, self.peers, lengths, "weights")
        found, row = self._chosen(gather(x, self.peers, lengths, "tokens"), chosen, weights)

        def home(y: Tensor) -> Tensor:
            partial = _summed(y, row, sum(lengths))
            if self.sums is not None:
                return summed_rows(partial, self.peers, lengths, self.sums)
            return reduce_scatter(partial, self.peers, lengths, "outputs")

        return Route(lambda: found, home)

    def _chosen(self, x: Tensor, chosen: Tensor, weight: Tensor) -> tuple[Sorted, Tensor]:
        """What the experts here are given of rows ``x [R, D]`` with choices ``[R, k]``, and of which row each is."""
        local, here = chosen.long() - self.mine.start, self.mine.stop - self.mine.start
        row, slot = ((local >= 0) & (local < here)).nonzero(as_tuple=True)
        expert = local[row, slot]
        place = expert.argsort(stable=True)  # rows come by source: they stay so within an expert
        row, slot = row[place], slot[place]
        return Sorted(x[row], weight[row, slot], expert.bincount(minlength=here).tolist()), row


def _sizes(first: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(first)]


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Summed(Function):
    """Rows added to where they belong; unlike ``index_add`` it holds no rows for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(row)
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.new_zeros(rows, x.shape[1]).index_add_(0, row, wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return dx[row], None, None


def _summed(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """``[rows, D]``: the sum of the rows ``x [m, D]`` of each, in float32 at least, rounded once."""
    found: Tensor = _Summed.apply(x, row, rows)  # type: ignore[no-untyped-call]
    return found


def balance_loss(probabilities: Tensor, index: Tensor, first: Sequence[int]) -> Tensor:
    """Loss that evens out how much work each process gets, whichever of its experts that is for; 1 where it is even.

    It is the sum over processes of their share of all choices times their share of the router's probability, times
    their number: the load-balancing loss of Switch Transformers with a process's experts taken as one.

    Args:
        probabilities: ``[T, E]`` of the router, each row adding up to 1.
        index: ``[T, k]``, experts chosen.
        first: expert of each process, and behind them the number of all, see :class:`ExpertParallel`.
    """
    starts = torch.tensor(first[1:-1], device=index.device)
    ranks = len(first) - 1
    owner = torch.bucketize(index.flatten(), starts, right=True)
    share = owner.bincount(minlength=ranks) / owner.numel()
    mass = torch.stack([part.sum(1).mean() for part in probabilities.split(_sizes(first), 1)])
    return ranks * (share.to(mass.dtype) * mass).sum()
