# SPDX-License-Identifier: Apache-2.0
"""The state that stands before the tokens of each process, where a state is passed on linearly: a scan over processes.

What a process does to a state is a pair (M, S): ``state -> M state + S``, with S ``[..., K, V]`` and M a factor on each
row (``[..., K]``, or ``[..., 1]`` for all), or a matrix ``[..., K, K]``. Pairs are put together by ``(M', S') (M, S) =
(M' M, M' S + S')``, so that any exchange that keeps their order gives the same states:

    chain       state by state, cut into K pieces that follow each other: ZeCO's All-Scan (arXiv 2507.01004); with one
                piece LASP's ring (arXiv 2404.02882). Each process sends S once, however many there are: P - 2 + K steps
    doubling    each reads from twice as far at each step (Hillis and Steele, 1986): log2 P steps, a pair in each
    all_gather  every pair to every process, which puts them together: LASP-2 (arXiv 2502.07563), P - 1 steps of a ring

The gradient is the same scan with the processes in reverse order and M transposed. A scan begins when S is there, and
is waited for where the state is needed: it runs on a stream of its own on a GPU, and in a thread on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError
from . import _cost
from ._peers import Arriving, Peers

__all__ = ["SCANS", "StateScan", "apply"]

Scan = Literal["chain", "doubling", "all_gather"]
SCANS: tuple[Scan, ...] = ("chain", "doubling", "all_gather")
Found = Callable[[], Tensor]


def apply(m: Tensor, s: Tensor) -> Tensor:
    """``M s``: M is a matrix where it has as many dimensions as ``s``, else a factor on rows."""
    return m @ s if m.ndim == s.ndim else m[..., None] * s


class StateScan:
    """States before the tokens of each of some processes, whose order is that of the tokens.

    Attributes:
        peers: the processes.
        exchange: of states, or ``auto``: what the alpha-beta model of ``link`` says is fastest.
        pieces: of a chain; None for those with which the model says it is fastest.
        link: between two processes.
    """

    def __init__(
        self, peers: Peers, exchange: Scan | Literal["auto"] = "auto", pieces: int | None = None,
        link: _cost.Link | None = None,
    ) -> None:  # fmt: skip
        """Nothing is sent yet.

        Raises:
            UserError: a name that is none, or fewer pieces than one.
        """
        if exchange not in ("auto", *SCANS):
            raise UserError(f"states are exchanged by {', '.join(SCANS)} or auto, not by {exchange!r}")
        if pieces is not None and pieces < 1:
            raise UserError(f"a chain has at least 1 piece, not {pieces}")
        self.peers, self.exchange, self.pieces = peers, exchange, pieces
        self.link = link or _cost.CLUSTERS["h100"].link(len(peers))
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def times(self, m: Tensor, s: Tensor) -> dict[Scan, float]:
        """Seconds that each exchange takes by the model."""
        ranks, pair = len(self.peers), m.nbytes + s.nbytes
        return {
            "chain": _cost.chain(self.link, ranks, s.nbytes, self._pieces(s)),
            "doubling": _cost.doubling(self.link, ranks, pair),
            "all_gather": _cost.all_gather(self.link, ranks, pair),
        }

    def chosen(self, m: Tensor, s: Tensor) -> Scan:
        """The exchange of such a pair; the same in every process, as sizes are."""
        if self.exchange != "auto":
            return self.exchange
        times = self.times(m, s)
        return min(SCANS, key=lambda name: times[name])

    def _pieces(self, s: Tensor) -> int:
        best = self.pieces or _cost.best_pieces(self.link, len(self.peers), s.nbytes)
        return max(1, min(best, s.shape[-1]))

    def state(self, m: Tensor, s: Tensor, meanwhile: Callable[[], Any]) -> tuple[Tensor, Any]:
        """The state before the tokens of this process, and what ``meanwhile`` gives, which is run while it travels.

        Args:
            m, s: of this process; float32 or float64. Every process has to ask, and to ask for gradients, as this one.
            meanwhile: what does not need the state. Its backward pass runs while the gradient travels.
        """
        flight: list[Found] = []
        sent = _Begin.apply(m, s, self, flight)  # type: ignore[no-untyped-call]
        found = meanwhile()
        return _End.apply(sent, m, self, flight), found  # type: ignore[no-untyped-call]

    def begin(self, m: Tensor, s: Tensor, reverse: bool = False) -> Found:
        """Start a scan, with ``reverse`` from the last process to the first; without gradients.

        Returns:
            What waits for the state before this process's tokens (in ``reverse``, the gradient of that after them).
        """
        m, s = m.detach(), s.detach()
        m = m.mT if reverse and m.ndim == s.ndim else m
        name = self.chosen(m, s)
        run: dict[Scan, Callable[[Tensor, Tensor, bool], Tensor]] = {
            "chain": self._chain, "doubling": self._doubling, "all_gather": self._all_gather
        }  # fmt: skip
        if len(self.peers) == 1:
            return lambda: torch.zeros_like(s)
        if s.is_cuda:
            return self._on_stream(run[name], m, s, reverse)
        if name == "all_gather":  # a collective, which must not meet another from a second thread
            ready = run[name](m, s, reverse)
            return lambda: ready
        self._thread = self._thread or ThreadPoolExecutor(1, "states")
        future: Future[Tensor] = self._thread.submit(run[name], m, s, reverse)
        return future.result

    def _on_stream(
        self, run: Callable[[Tensor, Tensor, bool], Tensor], m: Tensor, s: Tensor, reverse: bool
    ) -> Found:  # fmt: skip
        self._stream = stream = self._stream or torch.cuda.Stream(s.device)
        main = torch.cuda.current_stream(s.device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            found = run(m, s, reverse)
            done = stream.record_event()
        for x in (m, s):
            x.record_stream(stream)

        def wait() -> Tensor:
            now = torch.cuda.current_stream(s.device)
            now.wait_event(done)
            found.record_stream(now)
            return found

        return wait

    def _chain(self, m: Tensor, s: Tensor, reverse: bool) -> Tensor:
        _, other = _place(self.peers, reverse)
        before, after, name = other(-1), other(1), f"chain{', back' * reverse}"
        parts = s.tensor_split(self._pieces(s), -1)
        found: list[Tensor] = []
        going: Tensor | None = None
        sends: list[Arriving] = []
        for part in parts:  # a piece goes on while the next one comes
            if before is None:
                sends.append(self._move(part, after, None, None, name, s))
                found.append(torch.zeros_like(part))
                continue
            found.append(self._move(going, after, part.shape, before, name, s).wait())
            going = None if after is None else part + apply(m, found[-1])
        if going is not None:
            sends.append(self._move(going, after, None, None, name, s))
        for send in sends:
            send.wait()
        return torch.cat(found, -1)

    def _doubling(self, m: Tensor, s: Tensor, reverse: bool) -> Tensor:
        _, other = _place(self.peers, reverse)
        dense, far = m.ndim == s.ndim, 1
        every = m, s  # of this process and those before it, as far as they have been read
        one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m) if dense else torch.ones_like(m)
        found = one, torch.zeros_like(s)  # without this process
        while far < len(self.peers):
            to, source = other(far), other(-far)
            if to is not None or source is not None:
                sent = None if to is None else _packed(*every)
                size = None if source is None else (m.numel() + s.numel(),)
                came = self._move(sent, to, size, source, f"doubling{', back' * reverse}", s).wait()
                if source is not None:
                    earlier = _unpacked(came, m, s)
                    every, found = _together(every, earlier, dense), _together(found, earlier, dense)
            far *= 2
        return found[1]

    def _all_gather(self, m: Tensor, s: Tensor, reverse: bool) -> Tensor:
        place, _ = _place(self.peers, reverse)
        every = self._gather(_packed(m, s), f"all-gather{', back' * reverse}")
        found = torch.zeros_like(s)
        for packed in (every.flip(0) if reverse else every)[:place]:
            factor, added = _unpacked(packed, m, s)
            found = apply(factor, found) + added
        return found

    def _gather(self, x: Tensor, name: str) -> Tensor:
        """``[P, n]`` of ``x [n]``."""
        return self.peers.all_gather(x[None], [1] * len(self.peers), name)

    def _move(
        self, x: Tensor | None, to: int | None, shape: Sequence[int] | None, source: int | None, name: str, like: Tensor
    ) -> Arriving:  # fmt: skip
        """Send ``x`` to a process and receive what has ``shape`` from another, either of them if it is there."""
        peers, calls = self.peers, []
        sent = like[..., :0] if x is None else x.contiguous()
        into = like.new_empty(0 if shape is None else tuple(shape))
        if x is not None and to is not None:
            calls.append(dist.P2POp(dist.isend, sent, peers.ranks[to], peers.group))
            peers.ledger.add(name, {peers.ranks[to]: sent.nbytes})
        if shape is not None and source is not None:
            calls.append(dist.P2POp(dist.irecv, into, peers.ranks[source], peers.group))
        return Arriving(into, sent, dist.batch_isend_irecv(calls))

    def last(self, s: Tensor) -> Tensor:
        """The tensor of the last process, in all: as of the state after all tokens; without gradients."""
        found = s.detach().contiguous().clone()
        if len(self.peers) > 1:
            dist.broadcast(found, self.peers.ranks[-1], group=self.peers.group)
            if self.peers.rank == len(self.peers) - 1:
                self.peers.ledger.add("last state", dict.fromkeys(self.peers.ranks, found.nbytes))
        return found


def _place(peers: Peers, reverse: bool) -> tuple[int, Callable[[int], int | None]]:
    """Where this process stands in the order of the scan, and which rank stands so many places on, if any."""
    count, rank = len(peers), peers.rank
    place = count - 1 - rank if reverse else rank

    def other(by: int) -> int | None:
        there = place + by
        return None if not 0 <= there < count else count - 1 - there if reverse else there

    return place, other


def _packed(m: Tensor, s: Tensor) -> Tensor:
    return torch.cat([m.flatten(), s.flatten()])


def _unpacked(x: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    one, other = x.split([m.numel(), s.numel()])
    return one.view(m.shape), other.view(s.shape)


def _together(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor], dense: bool) -> tuple[Tensor, Tensor]:
    """The pair that does first what ``earlier`` does."""
    (m, s), (m0, s0) = later, earlier
    return (m @ m0 if dense else m * m0), s + apply(m, s0)


class _Begin(torch.autograd.Function):
    """A scan begins; on the way back its gradient has come."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, s: Tensor, scan: StateScan, flight: list[Found]) -> Tensor:
        flight.append(scan.begin(m, s))
        ctx.flight, ctx.dense = flight, m.ndim == s.ndim
        return s.view_as(s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        wait, m, before = ctx.flight[1]
        del ctx.flight[1:]
        after = wait()  # the gradient of the state after this process's tokens
        dm = None
        if ctx.needs_input_grad[0]:
            dm = after @ before.mT if ctx.dense else (after * before).sum(-1)
            dm = dm if dm.shape == m.shape else dm.sum(-1, keepdim=True)
        return dm, after, None, None


class _End(torch.autograd.Function):
    """The state has come; on the way back its gradient begins to travel."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, m: Tensor, scan: StateScan, flight: list[Any]) -> Tensor:
        before: Tensor = flight.pop()()
        flight.append(None)
        ctx.scan, ctx.flight = scan, flight
        ctx.save_for_backward(m, before)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor) -> tuple[Tensor | None, ...]:
        m, before = ctx.saved_tensors
        ctx.flight.append((ctx.scan.begin(m, dbefore, reverse=True), m.detach(), before))
        return dbefore, None, None, None
