# SPDX-License-Identifier: Apache-2.0
"""The attention of one layer: all hosts in turn in one process, or each in a process of its own.

Both call the same functions on the same tensors, so that they give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...attention.causal import causal_tail
from ...attention.rope import Rotary
from ...call import AttentionCall
from ...errors import UserError
from .._layouts import Layout
from .._partial import attend, merge
from .._peers import Peers
from .blocks import Blocks
from .scorers import Block

__all__ = ["Layer", "SharedPrompt", "among_processes", "in_turn"]

KV = tuple[Tensor, Tensor]
Choose = Callable[[Block, int, int], Tensor]  # of a block, how many and the first barred: tokens [B, Hkv, count]


@dataclass(frozen=True)
class Layer:
    """Queries, keys and values of a layer; of all tokens, or of a process's.

    Attributes:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, T, d]`` and ``[B, Hkv, T, dv]``.
        scale: of the logits.
        anchor: keys and values ``[B, Hkv, A, d]`` of the anchor; None without one.
        rotary: cosines and sines ``[B, T, r]`` of the tokens, where they are known.
        number: of the layer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    anchor: KV | None = None
    rotary: Rotary | None = None
    number: int = 0

    def cut(self, start: int, stop: int) -> Layer:
        """Some of the tokens."""
        q, k, v = (x[:, :, start:stop] for x in (self.q, self.k, self.v))
        rotary = None if self.rotary is None else (self.rotary[0][:, start:stop], self.rotary[1][:, start:stop])
        return replace(self, q=q, k=k, v=v, rotary=rotary)


def _passed(blocks: Blocks, host: int, mine: Layer, asked: Tensor, choose: Choose) -> Tensor:
    """What a host passes on: keys and values ``[l_p, B, Hkv, d + dv]``."""
    kv = torch.cat([mine.k, mine.v], 3)
    if not blocks.counts[host]:
        return kv[:, :, :0].permute(2, 0, 1, 3)
    block = Block(mine.q, mine.k, mine.v, asked, mine.scale, mine.rotary, mine.number, host)
    at = choose(block, blocks.counts[host], blocks.barred(host))
    return kv.gather(2, at[..., None].expand(-1, -1, -1, kv.shape[3])).permute(2, 0, 1, 3)


def _block(blocks: Blocks, host: int, mine: Layer, passing: Tensor) -> Tensor:
    """Output ``[B, T, H, dv]`` of a host's block, which sees ``[passing, anchor, block]``."""
    if not mine.q.shape[2]:
        return mine.v.new_empty(len(mine.q), 0, mine.q.shape[1], mine.v.shape[3])
    keys, values = (x for x in passing.permute(1, 2, 0, 3).tensor_split([mine.k.shape[3]], 3))
    front = [mine.anchor] if host and mine.anchor is not None else []
    k, v = (torch.cat([first, *(x[i] for x in front), own], 2) for i, (first, own) in enumerate(
        ((keys, mine.k), (values, mine.v))))  # fmt: skip
    return causal_tail(mine.q, k, v, mine.scale)


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float, tail: int) -> KV:
    """Output and log-sum-exp of the query to a host's keys, of which the last ``tail`` are its own, or none."""

    def seen(rows: slice) -> Tensor:
        queries = torch.arange(q.shape[2], device=q.device)[rows]
        keys = torch.arange(k.shape[2], device=q.device) - (k.shape[2] - q.shape[2])
        return keys <= queries[:, None]

    return attend(q, k, v, seen if tail else lambda _: None, scale)


def _merged(parts: Sequence[KV], like: Tensor) -> Tensor:
    """Output ``[B, T, H, dv]`` of parts in the order of the hosts."""
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge((out, lse), part)
    return out.transpose(1, 2).to(like.dtype)


def in_turn(blocks: Blocks, layer: Layer, choose: Choose) -> Tensor:
    """Output ``[B, n, H, dv]`` of a prompt, by one process that is each host in turn."""
    asked = layer.cut(blocks.document, blocks.length)
    passing, outs, parts = list[Tensor](), list[Tensor](), list[KV]()
    for host, (start, stop) in enumerate(blocks.bounds):
        mine, last = layer.cut(start, stop), host == blocks.hosts - 1
        before = torch.cat(passing) if passing else _none(mine)
        outs.append(_block(blocks, host, mine, before))
        passing.append(_passed(blocks, host, mine, asked.q, choose))
        shard = layer.cut(start, blocks.length) if last else mine
        parts.append(_part(asked.q, shard.k, shard.v, layer.scale, blocks.query * last))
    return torch.cat([*outs, _merged(parts, layer.q)], 1)


def among_processes(blocks: Blocks, layer: Layer, choose: Choose, peers: Peers) -> Tensor:
    """Output ``[B, T, H, dv]`` of the tokens of this process: its block, behind which the last one has the query."""
    host, size = peers.rank, blocks.size(peers.rank)
    last = host == blocks.hosts - 1
    mine = layer.cut(0, size)
    asked = _from_last(layer.q[:, :, size:], blocks.query, peers) if blocks.query else layer.q[:, :, size:]
    before = _none(mine)
    if max(blocks.counts):
        own = _passed(blocks, host, mine, asked, choose)
        before = peers.all_gather(own, blocks.counts, "passing")[: blocks.before(host)]
    out = _block(blocks, host, mine, before)
    if not blocks.query:
        return out
    found = _part(asked, layer.k, layer.v, layer.scale, blocks.query * last)
    parts = _to_last(torch.cat([found[0], found[1][..., None]], 3), peers)
    if not last:
        return out
    merged = _merged([(x[..., :-1], x[..., -1]) for x in parts.split(blocks.query, 2)], layer.q)
    return torch.cat([out, merged], 1)


def _from_last(x: Tensor, count: int, peers: Peers) -> Tensor:
    """What the last process has, ``[B, H, count, d]``, in all."""
    last = len(peers) - 1
    parts = [x.permute(2, 0, 1, 3)] * len(peers)  # elsewhere there is nothing in it
    lengths = [count * (rank == last) for rank in range(len(peers))]
    return peers.all_to_all(parts, lengths, "query").wait().permute(1, 2, 0, 3)


def _to_last(x: Tensor, peers: Peers) -> Tensor:
    """In the last process what all have, ``[B, H, T, d]`` one behind the other along T; nothing elsewhere."""
    last, x = len(peers) - 1, x.permute(2, 0, 1, 3)
    parts = [x if rank == last else x[:0] for rank in range(len(peers))]
    lengths = [len(x) * (peers.rank == last)] * len(peers)
    return peers.all_to_all(parts, lengths, "merge").wait().permute(1, 2, 0, 3)


def _none(mine: Layer) -> Tensor:
    """No passing block."""
    return torch.cat([mine.k, mine.v], 3)[:, :, :0].permute(2, 0, 1, 3)


class SharedPrompt:
    """A prompt of which each process has a block, and the last one the query behind it.

    Attributes:
        blocks: which tokens each host has.
        rows, layout: tokens of this process, and of each.
        front: tokens that this process reads first, in a forward of their own: the anchor, none in the first process.
    """

    def __init__(
        self, blocks: Blocks, choose: Choose, peers: Peers, check: Callable[[AttentionCall], None] = lambda _: None
    ) -> None:
        """Of the processes of a group.

        Args:
            blocks: of as many hosts.
            choose: what is passed on.
            peers: the processes.
            check: raises where a call is none that can be shared.
        """
        self.blocks, self._choose, self._peers, self._check = blocks, choose, peers, check
        stops = [*(stop for _, stop in blocks.bounds[:-1]), blocks.length]
        self.layout = Layout(tuple(torch.arange(a, b) for (a, _), b in zip(blocks.bounds, stops, strict=True)))
        self.rows = self.layout.rows[peers.rank]
        self.front = blocks.anchor if peers.rank else torch.arange(0)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of this process, of all along ``dim``."""
        return x.index_select(dim, self.rows.to(x.device))

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All tokens, of those of this process along ``dim``; in every process, without gradients."""
        lengths = list(map(len, self.layout.rows))
        return self._peers.all_gather(x.detach().transpose(0, dim), lengths, "unshard").transpose(0, dim)

    def attend(self, layer: Layer) -> Tensor:
        """Output ``[B, T, H, dv]`` of this process's tokens; there are no gradients."""
        return among_processes(self.blocks, layer, self._choose, self._peers)

    def attend_call(self, call: AttentionCall, front: KV | None) -> Tensor:
        """The same of a call of a model.

        Raises:
            UserError: gradients are asked for, or a layer that is not plain and causal.
        """
        self._check(call)
        if call.q.requires_grad and torch.is_grad_enabled():
            raise UserError("apb has no gradients between processes: read prompts under torch.inference_mode()")
        return self.attend(Layer(call.q, call.k, call.v, call.scale, front, call.rotary, call.site.layer or 0))
