# SPDX-License-Identifier: Apache-2.0
"""What each process runs of the tasks about scans over states: counts, errors, a training, times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...attention.recurrence import decay_attention
from ...models.decoder import Decoder, DecoderConfig
from ...parallel import World
from ...parallel._peers import Arriving, Peers
from ...parallel._scan import StateScan
from ...parallel.zeco import LinearParallel, ZeCO
from ...spec import parse

__all__ = ["ClockedScan", "counted", "errors", "losses", "times"]

ALL_TO_ALL, ALONE = "all-to-all of heads", "independent"
SCALE = 0.25


class ClockedScan(StateScan):
    """A scan whose messages carry the time of a logical clock: one a message, and one at a time from each process.

    Attributes:
        clock: when the last message that this process has waited for came.
    """

    clock = sent = 0

    def _move(
        self, x: Tensor | None, to: int | None, shape: Sequence[int] | None, source: int | None, name: str, like: Tensor
    ) -> Arriving:  # fmt: skip
        self.sent = max(self.sent, self.clock) + (x is not None)
        ledger, self.peers.ledger = self.peers.ledger, type(self.peers.ledger)(self.peers.ledger.rank)
        stamp = None if x is None else torch.tensor([float(self.sent)], dtype=like.dtype)
        came = super()._move(stamp, to, None if shape is None else (1,), source, name, like).wait()
        self.peers.ledger = ledger
        if shape is not None:
            self.clock = max(self.clock, int(came))
        return super()._move(x, to, shape, source, name, like)

    def _gather(self, x: Tensor, name: str) -> Tensor:
        """An all-gather as the ring that it is, step by step."""
        count, rank = len(self.peers), self.peers.rank
        found = {rank: x}
        for step in range(1, count):
            going = found[(rank - step + 1) % count]
            found[(rank - step) % count] = self._move(
                going, (rank + 1) % count, going.shape, (rank - 1) % count, name, x
            ).wait()
        return torch.stack([found[i] for i in range(count)])


def parallel(world: World, spec: str, clocked: bool = False) -> LinearParallel:
    """The strategy of a spec among the processes; ``clocked``: with a logical clock."""
    strategy = parse(spec)
    assert isinstance(strategy, ZeCO)
    found = strategy.share_states(world)
    if clocked:
        own = found.scan
        found.scan = ClockedScan(own.peers, own.exchange, own.pieces, own.link)
    return found


def counted(world: World, spec: str, shapes: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    """For ``(B, H, K, V)``: bytes that this process sends forward, the same backward, and its clock, in float32."""
    found: list[tuple[int, int, int]] = []
    for batch, heads, width, values in shapes:
        shared = parallel(world, spec, clocked=True)
        scan = shared.scan
        assert isinstance(scan, ClockedScan)
        m, s = torch.rand(batch, heads, width), torch.rand(batch, heads, width, values)
        sent = []
        for reverse in (False, True):
            before = world.ledger.bytes()
            scan.begin(m, s, reverse)()
            sent.append(world.ledger.bytes() - before)
            if not reverse:
                clock = scan.clock
        found.append((sent[0], sent[1], clock))
    return found


def errors(world: World, spec: str, length: int, seeds: Sequence[int]) -> list[float]:
    """By seed: the largest relative error of output and gradients in float64, beside one process."""
    found = []
    for seed in seeds:
        shared = parallel(world, spec)
        source = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, source: torch.Generator = source) -> Tensor:
            return torch.randn(*shape, generator=source, dtype=torch.float64)

        q, k, v, dout = drawn(2, 4, length, 8), drawn(2, 4, length, 8), drawn(2, 4, length, 6), drawn(2, 4, length, 6)
        g = -drawn(2, 4, length).abs()
        whole = [x.requires_grad_() for x in (q, k, v, g)]
        want, _ = decay_attention(*whole, scale=SCALE)
        wanted = [want, *torch.autograd.grad(want, whole, dout)]
        at = shared.mine(length)
        mine = [x.detach()[:, :, at].requires_grad_() for x in whole]
        out, _ = shared.attend(*mine, scale=SCALE)
        got = [out, *torch.autograd.grad(out, mine, dout[:, :, at])]
        pairs = [(x.detach(), y.detach()) for x, y in zip(got, wanted, strict=True)]
        found.append(max(float((x - y[:, :, at]).abs().max() / y.abs().max()) for x, y in pairs))
    return found


def losses(world: World, spec: str | None, mixer: str, text: Tensor, steps: int, rate: float) -> list[float]:
    """Loss at each step of a two-layer model of a mixer in float64, nats/token, its tokens shared by all processes.

    Args:
        world: of processes.
        spec: of the strategy; None for one process that has all tokens.
        mixer: its spec.
        text: bytes ``[steps, B, T + 1]``.
        steps: of AdamW.
        rate: of learning.
    """
    torch.manual_seed(0)
    length = text.shape[2] - 1
    model = Decoder(mixer, DecoderConfig(vocab=256, dim=32, layers=2, heads=4, length=length)).double()
    shared = None if spec is None else parallel(world, spec)
    at = slice(0, length) if shared is None else shared.mine(length)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    found = []
    for batch in text[:steps].long():
        ids, labels = batch[:, :-1][:, at], batch[:, 1:][:, at]
        state = None if shared is None else shared.states(model, len(batch), at.start)
        logits, _ = model(ids, state=state)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / (length * len(batch))
        optimizer.zero_grad()
        loss.backward()
        told = loss.detach()
        if shared is not None:
            held = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
            joined = torch.cat([told[None], *(x.flatten() for x in held)])
            dist.all_reduce(joined)
            told, *parts = joined.split([1, *(x.numel() for x in held)])
            for p, part in zip(model.parameters(), parts, strict=True):
                p.grad = part.view_as(p)
        optimizer.step()
        found.append(float(told))
    return found


class _Swap(torch.autograd.Function):
    """Heads of all tokens for tokens of all heads (``gather``), or back: one copy and one all-to-all each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, gather: bool) -> Tensor:
        ctx.peers, ctx.gather = peers, gather
        return _swapped(x, peers, gather)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return _swapped(dx, ctx.peers, not ctx.gather), None, None


def _swapped(x: Tensor, peers: Peers, gather: bool) -> Tensor:
    """``[1, H, T, ...]`` and ``[1, H / n, n T, ...]``."""
    count = len(peers)
    if gather:
        sent = x[0].contiguous()
    else:
        sent = x[0].unflatten(1, (count, -1)).transpose(0, 1).contiguous().flatten(0, 1)
    parts = sent.chunk(count)
    into = torch.empty_like(sent)
    dist.all_to_all_single(into, sent, group=peers.group)
    peers.ledger.add("all-to-all", dict.fromkeys(peers.ranks, parts[0].nbytes))
    if gather:
        into = into.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
    return into[None]


def times(
    world: World, arms: dict[str, str], tokens: int, heads: int, width: int, rounds: int, inner: int
) -> dict[str, list[float]]:  # fmt: skip
    """Milliseconds of a forward and backward pass by arm and round, of the slowest process; bfloat16 on GPUs.

    An arm is a spec of this strategy, :data:`ALL_TO_ALL`, or :data:`ALONE`, each process by itself.
    """
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", world.rank) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    q, k, v, dout = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in range(4))
    g = -torch.rand(1, heads, tokens, device=device) / 16
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    peers = world.peers([list(range(world.size))])

    def step(spec: str) -> Callable[[], None]:
        shared = parallel(world, spec) if spec not in (ALL_TO_ALL, ALONE) else None

        def run() -> None:
            if shared is not None:
                out, _ = shared.attend(q, k, v, g, scale=width**-0.5)
            elif spec == ALONE:
                out, _ = decay_attention(q, k, v, g, scale=width**-0.5)
            else:
                swapped = [_Swap.apply(x, peers, True) for x in leaves]  # type: ignore[no-untyped-call]
                out, _ = decay_attention(*swapped, scale=width**-0.5)
                out = _Swap.apply(out, peers, False)  # type: ignore[no-untyped-call]
            torch.autograd.grad(out, leaves, dout)

        return run

    work = {name: step(spec) for name, spec in arms.items()}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):  # two warm up
        for name, run in work.items():
            dist.barrier()
            spent = _seconds(run, inner, cuda)
            worst = torch.tensor([spent], device=device, dtype=torch.float64)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if turn >= 2:
                found[name].append(1e3 * float(worst) / inner)
    return found


def _seconds(run: Callable[[], None], inner: int, cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        for _ in range(inner):
            run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(inner):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
