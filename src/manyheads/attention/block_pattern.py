# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys each block of queries reads, as data: what sparse attention in :mod:`.sparse` is given.

A :class:`BlockPattern` holds for each block of queries (of each head, or of all) an ascending list of key blocks. The
two block sizes are separate numbers. Keys in blocks of 1 make a list of tokens, so blocks, vertical lines and chosen
tokens are read in one way. A list says what is read; what is seen of it follows exactly from the :class:`Rule` of the
call (causal, sliding window), from padding and from documents.

Legend: B batch, H query heads, T queries, S keys, n_q and n_k blocks of them (the last ones may be cut off), W the
longest list. Query t stands at column ``S - T + t``. ``[B, H, ...]`` may be 1 in the first two places: shared.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["BlockPattern", "Lists", "Rule", "blocks_of", "edges", "listed", "refined"]

_TILE = 64  # keys that a backward pass takes together where blocks of keys are smaller
_SHORT = 1024  # blocks that a list may have without being cut to the longest one


class Rule(NamedTuple):
    """What a query sees by position.

    Attributes:
        causal: no key later than the query.
        window: keys less than so many positions away (before the query; if not causal, on either side).
    """

    causal: bool = True
    window: int | None = None

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Boolean, of columns of queries and keys that are broadcast."""
        apart = query - key
        allowed = apart >= 0 if self.causal else torch.ones_like(apart, dtype=torch.bool)
        if self.window is not None:
            allowed = allowed & (apart < self.window)
            if not self.causal:
                allowed = allowed & (apart > -self.window)
        return allowed


class Lists(NamedTuple):
    """Lists of a direction, as the kernels read them.

    Attributes:
        indices: ``[B, H, n, W]`` int32, ascending; behind a row's last entry stands a number past all blocks.
        spans: ``[B, H, n, 4]`` int32: the entries from the first number to the last may be seen, those from the second
            to the third are seen whole.
        order: ``[B, H, n]`` int32, rows by falling length.
        bits: ``[B, H, n, W]`` int64, which of the up to 64 key blocks of a tile an entry reads; None for all.
        words, base: of a :class:`.tile_pattern.TilePattern`: the bits of its tiles, and the first one of each row.
    """

    indices: Tensor
    spans: Tensor
    order: Tensor
    bits: Tensor | None = None
    words: Tensor | None = None
    base: Tensor | None = None


def blocks_of(a: Any, b: int) -> Any:
    """How many blocks of ``b`` hold ``a``."""
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Lists of key blocks.

    Attributes:
        indices: ``[B or 1, H or 1, n_q, W]`` int32, numbers of key blocks, ascending, none twice; behind a row's last
            one stand numbers of at least n_k. :meth:`from_lists` makes them of lists in any order.
        block_q, block_k: queries and keys of a block.
        num_queries, num_keys: T and S.
    """

    indices: Tensor
    block_q: int
    block_k: int
    num_queries: int
    num_keys: int
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    masked = False  # by bits

    def __post_init__(self) -> None:
        if min(self.block_q, self.block_k) < 1 or min(self.num_queries, self.num_keys) < 1:
            raise UserError("blocks, queries and keys of a pattern count at least 1")
        if self.indices.ndim != 4 or self.indices.shape[2] != self.rows or self.indices.dtype != torch.int32:
            given = f"{tuple(self.indices.shape)} {self.indices.dtype}"
            raise UserError(f"the indices of a pattern are int32 [B or 1, H or 1, {self.rows}, W], not {given}")

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return int(blocks_of(self.num_queries, self.block_q))

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return int(blocks_of(self.num_keys, self.block_k))

    @property
    def shift(self) -> int:
        """The column of the first query."""
        return self.num_keys - self.num_queries

    @property
    def counts(self) -> Tensor:
        """``[B or 1, H or 1, n_q]``, the length of each list."""
        return (self.indices < self.columns).sum(-1, dtype=torch.int32)

    def to(self, device: torch.device | str) -> "BlockPattern":
        """The pattern on another device."""
        return replace(self, indices=self.indices.to(device), _memo={})

    # ---- from lists and masks of blocks

    @classmethod
    def from_lists(
        cls, indices: Tensor, num_queries: int, num_keys: int, *, block_q: int = 128, block_k: int = 128
    ) -> "BlockPattern":
        """Of integers ``[B or 1, H or 1, n_q, W]`` in any order; negative ones fill up, a second one counts nothing."""
        end = blocks_of(num_keys, block_k)
        x = torch.where(indices < 0, end, indices.clamp(max=end)).to(torch.int32).sort(-1).values
        again = torch.zeros_like(x, dtype=torch.bool)
        again[..., 1:] = x[..., 1:] == x[..., :-1]
        x = x.masked_fill(again, end).sort(-1).values.contiguous()
        return cls(x, block_q, block_k, num_queries, num_keys)

    @classmethod
    def from_blocks(
        cls, blocks: Tensor, num_queries: int, num_keys: int, *, block_q: int = 128, block_k: int = 128,
        most: int | None = None,
    ) -> "BlockPattern":  # fmt: skip
        """Of booleans ``[B or 1, H or 1, n_q, n_k]``.

        Args:
            blocks: True where a block is read.
            num_queries, num_keys, block_q, block_k: as the attributes.
            most: the longest list, if known; asking the device for it waits for the device.
        """
        if blocks.shape[2:] != (blocks_of(num_queries, block_q), blocks_of(num_keys, block_k)):
            given = f"{num_queries} queries in blocks of {block_q} and {num_keys} keys in blocks of {block_k}"
            raise UserError(f"a mask of blocks {tuple(blocks.shape)} is not of {given}")
        if most is None:
            most = int(blocks.sum(-1).max())
        indices = listed(blocks, max(1, most))
        return cls(indices, block_q, block_k, num_queries, num_keys)

    def blocks(self) -> Tensor:
        """Booleans ``[B or 1, H or 1, n_q, n_k]``."""
        made = self.indices.new_zeros(*self.indices.shape[:3], self.columns + 1, dtype=torch.bool)
        return made.scatter_(3, self.indices.clamp(max=self.columns).long(), True)[..., : self.columns]

    def to_mask(self, rule: Rule | None = None) -> Tensor:
        """Booleans ``[B or 1, H or 1, T, S]``; with a rule, of what is seen."""
        whole = self.blocks().repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        mask = whole[:, :, : self.num_queries, : self.num_keys]
        if rule is None:
            return mask
        queries = torch.arange(self.num_queries, device=mask.device)[:, None] + self.shift
        return mask & rule.allows(queries, torch.arange(self.num_keys, device=mask.device))

    # ---- algebra

    def __or__(self, other: "BlockPattern") -> "BlockPattern":
        """What either reads."""
        return _joined(self, other, torch.logical_or)

    def __and__(self, other: "BlockPattern") -> "BlockPattern":
        """What both read."""
        return _joined(self, other, torch.logical_and)

    def __invert__(self) -> "BlockPattern":
        """What is not read."""
        return _of(self, ~self.blocks())

    # ---- what is derived, once for each rule

    def density(self, rule: Rule) -> float:
        """Share of the pairs that ``rule`` allows which the pattern reads. The first call waits for the device."""
        key = "density", rule
        if key not in self._memo:
            first, last = edges(self.num_queries, self.block_q, self.shift, self.indices.device)
            total = _pairs(rule, first, last, torch.zeros_like(first)[:1], self.num_keys).sum()
            start = self.indices.long() * self.block_k
            width = (self.num_keys - start).clamp(0, self.block_k)
            held = _pairs(rule, first[:, None], last[:, None], start, width).sum()
            lists = self.indices.shape[0] * self.indices.shape[1]
            self._memo[key] = float(held.double() / (lists * total).clamp(min=1))
        return float(self._memo[key])

    def lists(self, rule: Rule) -> Lists:
        """Lists of key blocks for each block of queries."""
        key = "lists", rule
        if key not in self._memo:
            first, last = edges(self.num_queries, self.block_q, self.shift, self.indices.device)
            window, size = rule.window, self.block_k
            whole, seen = torch.full_like(first, self.num_keys), torch.full_like(first, self.num_keys)
            if rule.causal:
                whole, seen = first + 1, last + 1
            elif window is not None:
                whole, seen = (first + window).clamp(max=self.num_keys), (last + window).clamp(max=self.num_keys)
            before = torch.zeros_like(first) if window is None else (first - window + 1).clamp(min=0) // size
            left = before if window is None else blocks_of((last - window + 1).clamp(min=0), size)
            marks = torch.stack([before, left, whole // size, blocks_of(seen, size)], -1)
            self._memo[key] = _spanned(self.indices, marks)
        found: Lists = self._memo[key]
        return found

    def transposed(self, rule: Rule, groups: int = 1) -> Lists:
        """Lists of blocks of queries for each tile of keys: a block, or 64 keys where blocks are smaller.

        Args:
            rule: what is seen.
            groups: query heads that share a key head; ``order`` is for these together.
        """
        key = "transposed", rule, groups
        if key not in self._memo:
            tile, size, shift = self.tile, self.block_q, self.shift
            start, stop = edges(self.num_keys, tile, 0, self.indices.device)
            window, end = rule.window, self.num_queries + shift
            before = left = torch.zeros_like(start)
            if rule.causal:
                before, left = (start - shift).clamp(min=0) // size, blocks_of((stop - shift).clamp(min=0), size)
            elif window is not None:
                before = (start - window + 1 - shift).clamp(min=0) // size
                left = blocks_of((stop - window + 1 - shift).clamp(min=0), size)
            whole, seen = torch.full_like(start, end), torch.full_like(start, end)
            if window is not None:
                whole, seen = (start + window).clamp(max=end), (stop + window).clamp(max=end)
            whole, seen = (whole - shift).clamp(min=0), (seen - shift).clamp(min=0)
            marks = torch.stack([before, left, whole // size, blocks_of(seen, size)], -1)
            indices, bits = _turned(self)
            made = _spanned(indices, marks, groups if indices.shape[1] > 1 else 1)
            if bits is not None:
                made.spans[..., 2] = made.spans[..., 1]  # what is seen whole is not known of a tile of several lists
            self._memo[key] = made._replace(bits=bits)
        found: Lists = self._memo[key]
        return found

    @property
    def tile(self) -> int:
        """Keys of a list of :meth:`transposed`."""
        return self.block_k if self.block_k >= _TILE else _TILE // self.block_k * self.block_k


def edges(length: int, size: int, shift: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """First and last column of each block."""
    first = torch.arange(0, length, size, device=device)
    return first + shift, (first + size).clamp(max=length) - 1 + shift


def listed(blocks: Tensor, most: int) -> Tensor:
    """Numbers of the true columns of each row, ascending, ``[..., most]`` int32; the number of columns fills up."""
    columns = blocks.shape[-1]
    place = (blocks.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~blocks, most).clamp(max=most).long()
    made = torch.full((*blocks.shape[:-1], most + 1), columns, dtype=torch.int32, device=blocks.device)
    number = torch.arange(columns, dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    return made.scatter_(-1, place, number)[..., :most].contiguous()


def _spanned(indices: Tensor, marks: Tensor, groups: int = 1) -> Lists:
    """Lists with spans; ``marks [n, 4]`` are block numbers: seen from, whole from, whole to, seen to."""
    marks = marks.to(torch.int32).expand(*indices.shape[:3], 4).contiguous()
    spans = torch.searchsorted(indices, marks, out_int32=True)
    first, left, right, last = spans.unbind(-1)
    left = torch.minimum(left, last)
    right = torch.maximum(torch.minimum(right, last), left)
    spans = torch.stack([first, left, right, last], -1)
    lengths = (last - first).unflatten(1, (-1, groups)).sum(2)
    return Lists(indices, spans, lengths.argsort(dim=-1, descending=True, stable=True).to(torch.int32))


def _pairs(rule: Rule, first: Tensor, last: Tensor, start: Tensor, width: Tensor | int) -> Tensor:
    """How many pairs of queries ``first .. last`` and keys ``start ..``, so many, the rule allows."""

    def up_to(offset: int) -> Tensor:
        """Pairs whose key is at most so many columns behind its query."""

        def total(most: Tensor) -> Tensor:  # sum of min(u, width) for u = 1 .. most
            most = most.clamp(min=0)
            few = torch.minimum(most, torch.as_tensor(width, device=most.device))
            return few * (few + 1) // 2 + (most - few) * width

        return total(last + offset - start + 1) - total(first + offset - start)

    if rule.causal:
        held = up_to(0)
    elif rule.window is not None:
        held = up_to(rule.window - 1)
    else:
        held = (last - first + 1) * width * torch.ones_like(start)
    return held if rule.window is None else held - up_to(-rule.window)


def refined(pattern: BlockPattern, block_q: int, block_k: int) -> BlockPattern:
    """The same pairs in smaller blocks, whose sizes divide these."""
    if (block_q, block_k) == (pattern.block_q, pattern.block_k):
        return pattern
    if pattern.block_q % block_q or pattern.block_k % block_k:
        given = f"{pattern.block_q} x {pattern.block_k}"
        raise UserError(f"blocks of {given} cannot be cut into {block_q} x {block_k}: they must divide")
    blocks = pattern.blocks().repeat_interleave(pattern.block_q // block_q, 2)
    blocks = blocks.repeat_interleave(pattern.block_k // block_k, 3)
    rows, columns = blocks_of(pattern.num_queries, block_q), blocks_of(pattern.num_keys, block_k)
    sizes = {"block_q": block_q, "block_k": block_k}
    most = min(columns, pattern.indices.shape[3] * (pattern.block_k // block_k))
    cut = blocks[:, :, :rows, :columns]
    return BlockPattern.from_blocks(cut, pattern.num_queries, pattern.num_keys, most=most, **sizes)


def _joined(one: BlockPattern, other: BlockPattern, how: Callable[[Tensor, Tensor], Tensor]) -> BlockPattern:
    """Both in blocks that fit into those of either."""
    if (one.num_queries, one.num_keys) != (other.num_queries, other.num_keys):
        raise UserError("patterns of different numbers of queries or keys do not go together")
    sizes = gcd(one.block_q, other.block_q), gcd(one.block_k, other.block_k)
    one, other = refined(one, *sizes), refined(other, *sizes)
    return _of(one, how(one.blocks(), other.blocks()))


def _of(pattern: BlockPattern, blocks: Tensor) -> BlockPattern:
    """Other blocks of the same sizes."""
    sizes = {"block_q": pattern.block_q, "block_k": pattern.block_k}
    return BlockPattern.from_blocks(blocks, pattern.num_queries, pattern.num_keys, **sizes)


def _turned(pattern: BlockPattern) -> tuple[Tensor, Tensor | None]:
    """Transposed lists, and the bits of tiles of several blocks."""
    if "turned" in pattern._memo:
        return pattern._memo["turned"]  # type: ignore[no-any-return]
    each = pattern.tile // pattern.block_k
    blocks, bits = pattern.blocks().transpose(2, 3), None
    if each > 1:
        blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -blocks.shape[2] % each)).unflatten(2, (-1, each))
        any_ = blocks.any(3)
    else:
        any_ = blocks
    most = pattern.rows if pattern.rows <= _SHORT else int(any_.sum(-1).max())  # asking the device would wait for it
    indices = listed(any_, max(1, most))
    if each > 1:
        bits = torch.zeros(indices.shape, dtype=torch.int64, device=indices.device)
        at = indices.long().clamp(max=blocks.shape[4] - 1)
        for i in range(each):
            bits |= blocks[:, :, :, i].gather(3, at).long() << i
    pattern._memo["turned"] = indices, bits
    return indices, bits
