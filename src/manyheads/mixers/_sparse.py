# SPDX-License-Identifier: Apache-2.0
"""Base of strategies that read few keys for each block of queries of a long prompt, at a budget that all share.

A paper says which tokens a block of queries reads, :meth:`SparseAttention.choose`. The rest is the same for all: first
and local tokens are always read, the last queries of a prompt read everything, causality is exact within what is read,
and every block reads the same number of tokens whatever chose them, so that rivals are equal in pairs.

Legend: H query heads, Hkv key/value heads, I index sets (1, Hkv or H), T queries, S keys, n blocks of queries, C chunks
of keys. Query t stands at column ``S - T + t``.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..attention.block_pattern import BlockPattern, Rule, edges
from ..attention.causal import causal_tail
from ..attention.reference import repeat_kv, widened
from ..attention.sparse import block_sparse_attention
from ..call import AttentionCall, Site
from ..errors import UserError
from ..strategy import AttentionCompute

__all__ = ["Index", "Row", "SparseAttention", "Spans", "grouped"]

Index = Literal["shared", "kv", "query"]


class Row(NamedTuple):
    """One sequence of a batch, without its padding.

    Attributes:
        q: ``[H, T, d]``, the queries that read few keys, and behind them ``tail`` that read all.
        k: ``[Hkv, S, d]``.
        tail: queries at the end that read everything.
        scale: factor on ``q k^T``.
        rule: what a query sees by its position.
        layer: of the site.
    """

    q: Tensor
    k: Tensor
    tail: int
    scale: float
    rule: Rule
    layer: int

    @property
    def queries(self) -> Tensor:
        """``[H, T - tail, d]``."""
        return self.q[:, : self.q.shape[1] - self.tail]

    @property
    def keys(self) -> Tensor:
        """``[Hkv, S - tail, d]``, those that are not behind all these queries."""
        return self.k[:, : self.k.shape[1] - self.tail]


class Spans(NamedTuple):
    """Tokens chosen for each block of queries: of each chunk, in their order, the first ones of what may be chosen.

    Attributes:
        start: ``[n, C]``, the column of the first.
        width: ``[I, n, C]``, how many.
        chunk: ``[S - tail]``, the chunk of each column.
    """

    start: Tensor
    width: Tensor
    chunk: Tensor

    def tokens(self) -> Tensor:
        """bool ``[I, n, S - tail]``."""
        place = torch.arange(len(self.chunk), device=self.chunk.device) - self.start[:, self.chunk]
        found: Tensor = (place >= 0) & (place < self.width[:, :, self.chunk])
        return found

    def listed(self, first: int, local: Tensor, stop: Tensor, most: int) -> Tensor:
        """Lists ``[I, n, most]`` int32 of the columns below ``first``, those chosen, and ``local`` up to ``stop``.

        They ascend; the number of columns fills up. Work is that of the lists, not that of all pairs.
        """
        width = self.width
        begin = torch.cat([torch.zeros_like(local)[:, None], self.start, local[:, None]], 1).to(torch.int32)
        parts = [torch.full_like(width[..., :1], first), width, (stop - local).expand(len(width), -1)[..., None]]
        ends = torch.cat(parts, 2).cumsum(2, dtype=torch.int32)
        number = torch.arange(most, dtype=torch.int32, device=begin.device).expand(*width.shape[:2], -1).contiguous()
        span = torch.searchsorted(ends, number, right=True)
        past, span = span == ends.shape[2], span.clamp(max=ends.shape[2] - 1)
        before = torch.nn.functional.pad(ends[..., :-1], (1, 0))
        columns = (begin - before).gather(2, span) + number
        return columns.masked_fill(past, len(self.chunk))


@dataclass(frozen=True, kw_only=True)
class SparseAttention(AttentionCompute):
    """Each block of queries reads the first tokens, the local ones, and ``budget`` of those between.

    Attributes:
        budget: tokens chosen for a block of queries.
        block: queries that share what they read.
        first: tokens at the start that all read.
        local: tokens before a block that it reads, besides its own.
        last: queries at the end of a forward that read everything: where a prompt has its question.
        index: who shares a choice: ``shared`` all heads of a layer, ``kv`` those of a key/value head, ``query`` none.
        decode: queries that continue a cache and are at most ``last`` (or one) at a time read ``dense`` everything or
            ``sparse`` a choice of their own.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    budget: int = field(default=1024, metadata={"help": "tokens chosen for each block of queries"})
    block: int = field(default=128, metadata={"help": "queries that share what they read"})
    first: int = field(default=128, metadata={"help": "first tokens, which all read"})
    local: int = field(default=128, metadata={"help": "tokens before a block of queries that it reads"})
    last: int = field(default=64, metadata={"help": "last queries of a prompt, which read everything"})
    index: Index = field(default="shared", metadata={"help": "a choice for all heads (shared), each kv or query head"})
    decode: Literal["dense", "sparse"] = field(default="dense", metadata={"help": "how decoded tokens read the cache"})

    def __post_init__(self) -> None:
        if min(self.budget, self.first, self.local, self.last) < 0 or self.block < 1:
            raise UserError(f"{self.slug}: budget, first, local and last count tokens, and a block has at least one")

    def selects(self, site: Site) -> bool:
        return site.causal and super().selects(site)

    @abstractmethod
    def choose(self, row: Row) -> Spans:
        """Which tokens each block of queries reads besides first and local ones.

        Make it with :meth:`filled`, which reads exactly what the budget allows of what may be chosen.
        """

    @property
    def most(self) -> int:
        """Tokens that a block of queries reads at most."""
        return self.first + self.budget + self.local + self.block

    def attend(self, call: AttentionCall) -> Tensor | None:
        """The sparse output; None, so that the model attends itself, where everything is read."""
        length, tail = call.q.shape[2], self._tail(call)
        self._check(call)
        if tail == length or call.k.shape[2] - tail - 1 <= self.first + self.budget + self.local:
            return None
        out = call.v.new_zeros(*call.q.shape[:1], length, call.q.shape[1], call.v.shape[3])
        for b, start, stop, row in self.rows(call):
            q, k, v = call.q[b : b + 1], call.k[b : b + 1, :, start:stop], call.v[b : b + 1, :, start:stop]
            end = length - (call.k.shape[2] - stop)  # of the queries of this row
            few, keys = end - row.tail, k.shape[2] - row.tail
            if few > end - row.q.shape[1]:
                found = block_sparse_attention(
                    q[:, :, end - row.q.shape[1] : few], k[:, :, :keys], v[:, :, :keys], self.pattern(row),
                    scale=call.scale, window=row.rule.window,
                )  # fmt: skip
                out[b, end - row.q.shape[1] : few] = found[0].transpose(0, 1)
            if row.tail:
                out[b, few:end] = _tail(q[:, :, few:end], k, v, call.scale, row.rule)[0]
        return out

    def rows(self, call: AttentionCall) -> Iterator[tuple[int, int, int, Row]]:
        """The sequences of a call: number, first column, the column behind the last, and what it holds.

        Raises:
            UserError: the mask is not causality, the site's window and padding at the ends.
        """
        length, size = call.q.shape[2], call.k.shape[2]
        rule, layer = Rule(True, call.site.window), call.site.layer or 0
        for b, (start, stop) in enumerate(_columns(call, rule)):
            end = length - (size - stop)
            begin = max(0, start - (size - length))
            q, k = call.q[b, :, begin:end].detach(), call.k[b, :, start:stop].detach()
            yield b, start, stop, Row(q, k, min(self._tail(call), q.shape[1]), call.scale, rule, layer)

    @torch.no_grad()
    def pattern(self, row: Row) -> BlockPattern:
        """What the queries of a row but its tail read, causality left out."""
        begin, end = self._edges(row)
        few, size = row.queries.shape[1], row.keys.shape[1]
        first = min(self.first, size)
        local = (begin - self.local).clamp(min=first)
        made = self.choose(row).listed(first, local, torch.maximum(end + 1, local), min(self.most, size))[None]
        if made.shape[1] not in (1, row.q.shape[0]):
            made = made.repeat_interleave(row.q.shape[0] // made.shape[1], 1)
        return BlockPattern(made, self.block, 1, few, size)

    def filled(self, scores: Tensor, bounds: Tensor, row: Row, budget: int | None = None) -> Spans:
        """Tokens of the best chunks until the budget is spent; of the last one its first tokens. Ties: the earlier one.

        Args:
            scores: ``[I, n, C]`` of chunks by block of queries.
            bounds: ``[C + 1]`` ascending columns from 0 to ``S - tail``.
            row: the sequence.
            budget: tokens, by default :attr:`budget`.
        """
        low, high = self._between(row)
        start = torch.maximum(bounds[:-1], low[:, None])  # [n, C], the part of a chunk that may be chosen
        width = (torch.minimum(bounds[1:], high[:, None]) - start).clamp(min=0)
        order = scores.masked_fill(width == 0, -torch.inf).sort(dim=2, descending=True, stable=True).indices
        ranked = width.expand_as(order).gather(2, order)
        left = (self.budget if budget is None else budget) - (ranked.cumsum(2) - ranked)
        taken = torch.zeros_like(ranked).scatter(2, order, torch.minimum(ranked, left.clamp(min=0)))
        columns = torch.arange(row.keys.shape[1], device=scores.device)
        return Spans(start, taken, torch.searchsorted(bounds, columns, right=True) - 1)

    def sets(self, row: Row) -> int:
        """How many choices there are, I."""
        return {"shared": 1, "kv": len(row.k), "query": len(row.q)}[self.index]

    def _edges(self, row: Row) -> tuple[Tensor, Tensor]:
        """First and last column of each block of queries."""
        few = row.queries.shape[1]
        return edges(few, self.block, row.keys.shape[1] - few, row.q.device)

    def _between(self, row: Row) -> tuple[Tensor, Tensor]:
        """The columns of which ``budget`` are chosen: from, and up to without, of each block of queries."""
        begin, _ = self._edges(row)
        low = torch.full_like(begin, self.first)
        if row.rule.window is not None:
            low = torch.maximum(low, begin - row.rule.window + 1)
        return low, torch.maximum(begin - self.local, low)

    def _tail(self, call: AttentionCall) -> int:
        """Queries at the end of the call that read everything."""
        length = call.q.shape[2]
        continues = isinstance(call.step, Tensor) or call.step > 0
        if continues and length <= max(1, self.last):
            return length if self.decode == "dense" else 0
        return min(self.last, length)

    def _check(self, call: AttentionCall) -> None:
        call.require_softmax()
        name = call.site.name
        if call.softcap is not None or call.sinks is not None or call.bias is not None or call.prepended:
            raise UserError(
                f"{self.slug}: {name} caps its logits, adds to them or has sinks, which sparse attention does not "
                'know; load the model with attn_implementation="sdpa", or leave the layer out by layers=...'
            )
        if call.dropout:
            raise UserError(f"{self.slug}: {name} drops weights at random, in training; call model.eval()")


def grouped(x: Tensor, heads: int) -> Tensor:
    """``[n, ...]`` as ``[heads, ...]`` in float32 or float64: means of groups, or repeated where heads are more."""
    if heads > len(x):
        return widened(x).repeat_interleave(heads // len(x), 0)
    found: Tensor = x.unflatten(0, (heads, -1)).mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return found


def _columns(call: AttentionCall, rule: Rule) -> list[tuple[int, int]]:
    """From and up to which column each row of a batch holds tokens."""
    (batch, _, length, _), size, mask = call.q.shape, call.k.shape[2], call.mask
    dropped = isinstance(call.step, int) and rule.window is None and call.step + length > size
    if mask is None and not dropped:
        if length > 1 and not call.is_causal:
            raise UserError(f"{call.site.name} attends to what follows, and sparse attention here is causal")
        return [(0, size)] * batch
    refusal = UserError(
        f"the mask at {call.site.name} is not causality, a window and padding at the ends of rows: sparse attention "
        "reads no other, and no cache from which tokens were dropped"
    )
    mask = call.allowed()
    if dropped or mask is None:
        raise refusal
    mask = mask.expand(batch, -1, length, size)
    columns = torch.arange(size, device=mask.device)
    real = mask.any(2).any(1)
    found = []
    for b in range(batch):
        held = columns[real[b]]
        start, stop = (int(held[0]), int(held[-1]) + 1) if len(held) else (size, size)
        begin, end = max(0, start - (size - length)), length - (size - stop)
        wanted = rule.allows(columns[size - length :][begin:end, None], columns)
        wanted = wanted & (columns >= start) & (columns < stop)
        if end > begin and not bool((mask[b, :, begin:end] == wanted).all()):
            raise refusal
        found.append((start, stop))
    return found


def _tail(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> Tensor:
    """The last queries over all keys, ``[1, T, H, dv]``."""
    if rule.window is None:
        return causal_tail(q, k, v, scale)
    columns = torch.arange(k.shape[2], device=k.device)
    mask = rule.allows(columns[k.shape[2] - q.shape[2] :, None], columns)
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
