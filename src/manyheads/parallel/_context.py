# SPDX-License-Identifier: Apache-2.0
"""Attention over tokens that several processes share: mask x layout x exchange, exact forward and backward.

    world = World()  # after torch.distributed.init_process_group
    shared = ContextParallel(world, causal(32768), layout="zigzag", exchange="ring", heads=2)
    q, k, v = (shared.shard(x, 2) for x in (q, k, v))  # [B, H, T, d] of this process
    out, lse = shared.attend(q, k, v)

With ``heads`` above 1 the processes form a grid: first an all-to-all among so many gives each of them all tokens of
the grid's row for a part of the heads (DeepSpeed-Ulysses, arXiv 2309.14509), then the exchange runs among the others.
With as many ``heads`` as processes that is Ulysses, with 1 it is the exchange alone, in between the two-dimensional
attention of LoongTrain (arXiv 2406.18485): for every mask and exchange here. Where there are fewer key/value heads than
``heads``, they are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError
from ._exchanges import AllGather, Exchange, GroupCast, Ring
from ._kept import kept
from ._layouts import Layout, layout
from ._ledger import Ledger
from ._masks import AttnMask
from ._partial import attend, attend_back
from ._peers import Peers

__all__ = ["EXCHANGES", "ContextParallel", "World"]

EXCHANGES: dict[str, type[Exchange]] = {"ring": Ring, "all_gather": AllGather, "group_cast": GroupCast}


class World:
    """Processes that share tokens.

    Attributes:
        group: of torch; None for all processes.
        rank, size: of this process among them, and how many there are.
        ranks: of each among all processes.
        ledger: of what this process sends.
    """

    def __init__(self, node: int = 0, group: dist.ProcessGroup | None = None) -> None:
        """Of all processes, or of a group's.

        Args:
            node: processes of a machine, whose ranks follow each other; 0 for all. Only for counting.
            group: of this process, as ``mesh.get_group()`` gives it.

        Raises:
            UserError: there is no process group, or this process is not of it.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise UserError("there are no processes to share tokens with: start with torchrun, and call "
                            "torch.distributed.init_process_group first")  # fmt: skip
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise UserError(f"process {dist.get_rank()} is not one of the group that is to share tokens; give its own")
        self.ranks = tuple(range(self.size) if group is None else dist.get_process_group_ranks(group))
        self.ledger = Ledger(self.ranks[self.rank], node)

    def peers(self, groups: Sequence[Sequence[int]] | None = None) -> Peers:
        """All, or the one of these groups that this process is in; every process has to ask for them, in one order."""
        mine = next(tuple(ranks) for ranks in groups or [range(self.size)] if self.rank in ranks)
        ranks = [self.ranks[rank] for rank in mine]
        group = self.group if len(mine) == self.size else _group(tuple(ranks))
        return Peers(ranks, group, self.ledger)


_made: dict[tuple[int, ...], dist.ProcessGroup] = {}  # by ranks among all processes
_made_for: list[Any] = []  # the group of all processes at that time


def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The group of these processes, made once for all worlds since ``init_process_group``: each has threads of its own.

    Only those that are in it have to ask, so that all of them have it or none has.
    """
    if _made_for != [dist.group.WORLD]:
        _made.clear()
        _made_for[:] = [dist.group.WORLD]
    if ranks not in _made:
        _made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _made[ranks]


class ContextParallel:
    """Attention of a mask whose tokens the processes of a world share.

    Attributes:
        mask: which keys each token sees.
        layout: tokens of each process.
        rows: of this process, int64.
    """

    def __init__(
        self, world: World, mask: AttnMask, layout: str | Layout = "greedy", exchange: str = "group_cast",
        heads: int = 1, window: int | None = None, place: Literal["head", "context"] = "head",
    ) -> None:  # fmt: skip
        """How tokens are shared and keys exchanged.

        Args:
            world: of processes.
            mask: of all tokens.
            layout: one of :data:`manyheads.parallel.LAYOUTS`, or one of your own.
            exchange: one of ``EXCHANGES``.
            heads: processes that share heads among them; divides the number of processes.
            window: of processes of a ring's inner ring; all of them when not given.
            place: whether neighbours (as a rule on one machine) share heads, or context.

        Raises:
            UserError: numbers that do not divide, or names that are none.
        """
        if exchange not in EXCHANGES:
            raise UserError(f"there is no exchange {exchange!r}; there are {', '.join(EXCHANGES)}")
        if heads < 1 or world.size % heads:
            raise UserError(f"{world.size} processes do not divide into {heads} that share heads")
        if window is not None and exchange != "ring":
            raise UserError(f"windows are of a ring, not of {exchange}")
        self.world, self.mask, self.heads = world, mask, heads
        self.layout = given = make_layout(mask, world.size, layout)
        self.rows = given.rows[world.rank]
        self._rows: dict[torch.device, Tensor] = {}
        contexts = world.size // heads
        step, other = (1, heads) if place == "head" else (contexts, 1)
        grid = [[c * other + h * step for h in range(heads)] for c in range(contexts)]  # ranks, by context and head
        self._heads = world.peers(grid)
        along = world.peers(list(zip(*grid, strict=True)))
        rows = [torch.cat([given.rows[rank] for rank in ranks]) for ranks in grid]
        self._lengths = [len(given.rows[rank]) for ranks in grid if world.rank in ranks for rank in ranks]
        more = {"window": window} if exchange == "ring" else {}
        self.exchange: Exchange = EXCHANGES[exchange](along, rows, mask, **more)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of this process, of all along ``dim``."""
        if x.device not in self._rows:
            self._rows[x.device] = self.rows.to(x.device)
        return x.index_select(dim, self._rows[x.device])

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All tokens, of those of this process along ``dim``; in every process, without gradients."""
        lengths = [len(rows) for rows in self.layout.rows]
        every = self.world.peers().all_gather(x.detach().transpose(0, dim), lengths, "unshard")
        return torch.empty_like(every).index_copy_(0, torch.cat(self.layout.rows).to(x.device), every).transpose(0, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, T, dv]`` in the dtype of ``q``, and log-sum-exp ``[B, H, T]`` in float32 or float64.

        Args:
            q: ``[B, H, T, d]``, the tokens of this process.
            k, v: ``[B, Hkv, T, d]`` and ``[B, Hkv, T, dv]``; Hkv divides H.
            scale: of the logits; ``d ** -0.5`` when None.

        Raises:
            UserError: other numbers of tokens than the layout has, or heads that cannot be shared.
        """
        if any(x.shape[2] != len(self.rows) for x in (q, k, v)):
            raise UserError(f"process {self.world.rank} has {len(self.rows)} tokens of this layout, not {q.shape[2]}")
        if q.shape[1] % k.shape[1]:
            raise UserError(f"{q.shape[1]} heads cannot share {k.shape[1]} of keys evenly")
        scale = q.shape[3] ** -0.5 if scale is None else scale
        given = self._heads, self._lengths
        if self.heads > 1:
            k, v = (self._repeated(x, q.shape[1]) for x in (k, v))
            q, k, v = (_Regroup.apply(x, *given, True) for x in (q, k, v))  # type: ignore[no-untyped-call]
        out, lse = _Attend.apply(q, k, v, self.exchange, scale)  # type: ignore[no-untyped-call]
        if self.heads > 1:
            out = _Regroup.apply(out, *given, False)  # type: ignore[no-untyped-call]
            lse = _Regroup.apply(lse[..., None], *given, False)[..., 0]  # type: ignore[no-untyped-call]
        return out, lse

    def _repeated(self, x: Tensor, heads: int) -> Tensor:
        """Key/value heads, as often as it takes for each process to have one."""
        kv_heads = x.shape[1]
        times = max(1, self.heads // kv_heads)
        if heads % self.heads or (kv_heads * times) % self.heads:
            raise UserError(f"{heads} heads with {kv_heads} of keys cannot be shared by {self.heads} processes")
        return x.repeat_interleave(times, 1)


def make_layout(mask: AttnMask, ranks: int, given: str | Layout) -> Layout:
    """A layout by name, or the one given, for so many processes."""
    if isinstance(given, str):
        return layout(given, mask, ranks)
    if len(given.rows) != ranks or given.size != mask.size:
        raise UserError(f"a layout of {given.size} tokens for {len(given.rows)} processes, not {mask.size} for {ranks}")
    return given


def _to_heads(x: Tensor, peers: Peers, lengths: Sequence[int], name: str) -> Tensor:
    """``[B, H, T, d]`` of this process's tokens -> ``[B, H / n, T of all n, d]``."""
    parts = x.permute(2, 0, 1, 3).chunk(len(peers), 2)  # [T, B, H / n, d]
    return peers.all_to_all([p.contiguous() for p in parts], lengths, name).wait().permute(1, 2, 0, 3)


def _to_tokens(x: Tensor, peers: Peers, lengths: Sequence[int], name: str) -> Tensor:
    """The way back."""
    mine = lengths[peers.rank]
    found = peers.all_to_all(x.permute(2, 0, 1, 3).split(list(lengths)), [mine] * len(peers), name).wait()
    every: Tensor = found.unflatten(0, (len(peers), mine)).permute(2, 0, 3, 1, 4)  # [B, n, H / n, T, d]
    return every.flatten(1, 2)


class _Regroup(torch.autograd.Function):
    """One of the two ways, and the other for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, lengths: Sequence[int], heads: bool) -> Tensor:
        ctx.peers, ctx.lengths, ctx.other = peers, lengths, _to_tokens if heads else _to_heads
        return (_to_heads if heads else _to_tokens)(x, peers, lengths, "all-to-all")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.other(dx, ctx.peers, ctx.lengths, "all-to-all, back"), None, None, None


class _Attend(torch.autograd.Function):
    """Rows of this process to the keys of its group; what is kept for the way back is of this process alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, scale: float) -> tuple[Tensor, Tensor]:
        kv = torch.cat([k, v], 3).permute(2, 0, 1, 3).contiguous()  # [T, B, Hkv, d + dv]
        keep = kept()
        found = None if keep is None else keep.next()
        if found is None:
            for step, (tokens, block) in enumerate(exchange.visit(kv)):
                keys, values = _apart(block, k.shape[3])
                found = attend(q, keys, values, exchange.tiles(step, tokens, q.device), scale, found)
            assert found is not None
            if keep is not None:
                keep.add(found)
        out, lse = found
        ctx.save_for_backward(q, kv, out, lse)
        ctx.exchange, ctx.scale, ctx.width = exchange, scale, k.shape[3]
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        delta = (dout * out).sum(-1) - dlse
        dq, steps = None, count()

        def gradient(tokens: Tensor, block: Tensor) -> Tensor:
            nonlocal dq
            keys, values = _apart(block, ctx.width)
            seen = ctx.exchange.tiles(next(steps), tokens, q.device)
            dkv = torch.empty_like(block, dtype=out.dtype)
            into = _apart(dkv, ctx.width)
            dq, *_ = attend_back(q, keys, values, seen, ctx.scale, lse, delta, dout, dq, into)
            return dkv

        dk, dv = _apart(ctx.exchange.back(kv, gradient), ctx.width)
        assert dq is not None
        return dq.to(q.dtype), dk.to(kv.dtype), dv.to(kv.dtype), None, None


def _apart(block: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Keys ``[B, Hkv, S, d]`` and values of a block ``[S, B, Hkv, d + dv]``."""
    k, v = block.permute(1, 2, 0, 3).tensor_split([width], 3)
    return k, v
