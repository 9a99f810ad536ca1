# SPDX-License-Identifier: Apache-2.0
"""Exact statistics of attention weights at any length: rows of weights are made a block at a time and never kept.

A :class:`Statistic` says what it wants of the weights ``A [B, H, T, S]`` of a call (after mask, cap and learned sinks,
so rows may sum to less than 1); :func:`manyheads.calls.weights.measure` makes the weights once for all of them.
Whatever is linear in a row is an :class:`WeightedSum`: the mass on a role is that of its indicator, the mean position
that of the column's number.

Legend: B batch, H query heads, Hkv key/value heads, T queries, S keys. Query ``t`` stands at column ``S - T + t``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "Band", "Columns", "ColumnSum", "Distance", "Entropy", "LogPowerSum", "MeanLogWeight", "Peak", "Pooled", "Rows",
    "Statistic", "WeightedSum",
]  # fmt: skip


class Statistic(Protocol):
    """What is kept of the weights. ``update`` is given rows ``[B, H, t, S]`` in order, and where they start."""

    def update(self, rows: Tensor, start: int, length: int) -> None: ...
    def result(self) -> Any: ...


@dataclass
class Rows:
    """Base of a statistic that has a value for each row.

    Its place is taken at once: small results between large blocks that come and go would cut the heap to pieces.
    """

    made: Tensor | None = field(default=None, init=False)

    def put(self, values: Tensor, start: int, length: int) -> None:
        """Keep ``values [B, H, t, ...]`` of the rows from ``start`` on, of ``length`` in all."""
        if self.made is None:
            self.made = values.new_empty(*values.shape[:2], length, *values.shape[3:])
        self.made[:, :, start : start + values.shape[2]] = values

    def result(self) -> Any:
        assert self.made is not None
        return self.made


@dataclass
class WeightedSum(Rows):
    """Sum over s of ``A[t, s] features[s]``: ``[B, H, T, F]``.

    Attributes:
        features: ``[B or 1, S, F]``.
    """

    features: Tensor

    def update(self, rows: Tensor, start: int, length: int) -> None:
        self.put(rows @ self.features[:, None].to(rows.dtype), start, length)


@dataclass
class Columns(Rows):
    """The weights on a few columns: ``[B, H, T, C]``.

    Attributes:
        index: ``[C]`` columns.
    """

    index: Tensor

    def update(self, rows: Tensor, start: int, length: int) -> None:
        self.put(rows[..., self.index], start, length)


@dataclass
class Entropy(Rows):
    """``-sum A log A`` of each row in nats, ``[B, H, T]``."""

    def update(self, rows: Tensor, start: int, length: int) -> None:
        log = rows.clamp(min=torch.finfo(rows.dtype).tiny).log_()
        self.put(-log.mul_(rows).sum(-1), start, length)


@dataclass
class Peak(Rows):
    """The greatest logit of each row and its column, ``[B, H, T]`` and int64; -inf and -1 in a row that sees nothing.

    The logit is that before the softmax: scaled, capped, with the bias. Of equal ones the first column counts.
    """

    column: Tensor | None = field(default=None, init=False)

    def update(self, rows: Tensor, start: int, length: int) -> None:
        top, column = rows.max(-1)
        if self.column is None:
            self.column = column.new_empty(*column.shape[:2], length)
        self.column[:, :, start : start + rows.shape[2]] = column.masked_fill_(top == 0, -1)
        self.put(top, start, length)

    def logits(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The result from the rows' log-sum-exp ``[B, H, T]``: weights alone do not tell how great logits are."""
        assert self.made is not None and self.column is not None
        return torch.where(self.made > 0, self.made.log() + lse, -torch.inf), self.column


@dataclass
class LogPowerSum(Rows):
    """``log sum over s of A[t, s]^a`` for some powers a: ``[B, H, T, P]``, -inf in a row that sees nothing.

    Attributes:
        powers: a, above 0.
    """

    powers: tuple[float, ...]

    def update(self, rows: Tensor, start: int, length: int) -> None:
        log = rows.log()
        self.put(torch.stack([(a * log).logsumexp(-1) for a in self.powers], -1), start, length)


@dataclass
class Distance(Rows):
    """Sum over s of ``A[t, s] (t - s)``, in columns: ``[B, H, T]``.

    An WeightedSum of the position has the rounding of the position itself; this one has that of the distance.
    """

    def update(self, rows: Tensor, start: int, length: int) -> None:
        size, count = rows.shape[3], rows.shape[2]
        back = (size - length + start - torch.arange(size, device=rows.device)).to(rows.dtype)  # of the first row
        mass, found = (rows @ torch.stack([torch.ones_like(back), back], -1)).unbind(-1)
        self.put(found + torch.arange(count, device=rows.device).to(rows.dtype) * mass, start, length)


@dataclass
class MeanLogWeight(Rows):
    """Mean of ``log A[t, s]`` over the keys of a set that row t sees: ``[B, H, T, F]``, NaN where it sees none.

    The difference of two sets is that of their mean logits. By blocks, keys whose weight is 0 in float32 are not seen.

    Attributes:
        keys: ``[B or 1, S, F]`` boolean, F sets.
    """

    keys: Tensor

    def update(self, rows: Tensor, start: int, length: int) -> None:
        sets, seen = self.keys[:, None].to(rows.dtype), rows > 0
        log = rows.clamp(min=torch.finfo(rows.dtype).tiny).log_().mul_(seen)
        self.put((log @ sets) / (seen.to(rows.dtype) @ sets), start, length)


@dataclass
class ColumnSum:
    """Sum over t of ``rows[t] A[t, s]``: ``[B, H, S, R]``.

    Attributes:
        weight: ``[B or 1, T, R]`` weights of the rows.
    """

    weight: Tensor
    total: Tensor | None = field(default=None, init=False)

    def update(self, rows: Tensor, start: int, length: int) -> None:
        mine = self.weight[:, None, start : start + rows.shape[2]].to(rows.dtype)
        part = rows.transpose(-1, -2) @ mine
        self.total = part if self.total is None else self.total.add_(part)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total


@dataclass
class Band(Rows):
    """Weights near the diagonal, by how far back they reach: with ``f = profile``,

        rows    ``sum over j of f[j] A[t, t - j]``,  ``[B, H, T]``
        columns ``sum over j of f[j] A[s + j, s]``,  ``[B, H, S]``.

    Attributes:
        profile: ``[W]`` weights of the distances 0 to W - 1.
        queries: ``[B, T]``, rows that count for ``columns``; None for all.
        by: what is wanted; the other result may be None.
    """

    profile: Tensor
    queries: Tensor | None = None
    by: Literal["rows", "columns", "both"] = "both"
    columns: Tensor | None = field(default=None, init=False)

    def update(self, rows: Tensor, start: int, length: int) -> None:
        size, width = rows.shape[3], len(self.profile)
        low = max(0, size - length + start - width + 1)  # the least column within reach of these rows
        high = max(low, size - length + start + rows.shape[2])
        near = rows[..., low:high]
        t = size - length + start + torch.arange(rows.shape[2], device=rows.device)
        back = t[:, None] - torch.arange(low, high, device=rows.device)
        inside = (back >= 0) & (back < width)
        near = near * torch.where(inside, self.profile.to(rows)[back.clamp(0, width - 1)], 0.0)
        self.put(near.sum(-1), start, length)
        if self.by == "rows":
            return
        if self.columns is None:
            self.columns = rows.new_zeros(*rows.shape[:2], size)
        if self.queries is not None:
            near = near * self.queries[:, None, start : start + rows.shape[2], None]
        self.columns[..., low:high] += near.sum(2)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        return self.made, self.columns


@dataclass
class Pooled:
    """The map in at most ``size x size`` cells, each the mean of its weights: ``[B, H, R, C]``.

    Attributes:
        size: the most rows and columns of the picture.
    """

    size: int = 256
    made: Tensor | None = field(default=None, init=False)
    shape: tuple[int, int] = field(default=(0, 0), init=False)

    def update(self, rows: Tensor, start: int, length: int) -> None:
        size = rows.shape[3]
        self.shape = (-(-length // self.size), -(-size // self.size))
        high, wide = self.shape
        x = pad(rows, (0, -size % wide)).unflatten(-1, (-1, wide)).sum(-1)  # [B, H, t, C]
        cell = (start + torch.arange(rows.shape[2], device=rows.device)) // high
        if self.made is None:
            self.made = x.new_zeros(*x.shape[:2], -(-length // high), x.shape[3])
        self.made.index_add_(2, cell, x)

    def result(self) -> Tensor:
        assert self.made is not None
        return self.made / (self.shape[0] * self.shape[1])
