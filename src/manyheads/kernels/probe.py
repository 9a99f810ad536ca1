# SPDX-License-Identifier: Apache-2.0
"""Exact statistics of attention weights on a GPU without a map of T x S; ``calls.statistics`` says what they are.

One pass over the keys for each block of queries makes all that is linear in a row: with the running maximum and sum of
FlashAttention (arXiv 2205.14135) in the place of the values go up to 32 features at a time, and the logit itself, whose
expectation gives the entropy, ``lse - E[x]``. What is asked of single columns, of a band or of cells of the map takes
the log-sum-exp and makes its weights anew, ``exp(x - lse)``.

Logits are products of the tensor cores with float32 sums. Weights and features meet there too, each as two halves in
float16, 22 bits, so that the sums are as exact as float32 is. The queries of a group are
laid side by side in the first pass, so that a key is read once for its group.

Legend: B batch, H query heads, Hkv key/value heads, T queries, S keys, d channels. Query t stands at column
``S - T + t`` and sees the columns up to its own, or those of ``spans``: first and end ``[B, T]`` of a range.
"""

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from ..errors import UserError
from . import _probe
from ._operator import LOG2E, launch, operator
from .accumulated_attention import _strides

__all__ = ["Rows", "Spans", "band", "column_sum", "pool", "row_statistics"]

Spans = tuple[Tensor, Tensor]

_MOST = 32  # features of a launch


class Rows(NamedTuple):
    """Of each row, ``[B, H, T]`` float32.

    Attributes:
        lse: log-sum-exp, -inf for a row that sees nothing.
        entropy: in nats.
        distance: expected ``t - s`` in columns, where it was asked for.
        found: expected features ``[B, H, T, F]``.
        peak, column: greatest logit and its column (int32, -1 for none), where they were asked for.
    """

    lse: Tensor
    entropy: Tensor
    distance: Tensor
    found: Tensor
    peak: Tensor
    column: Tensor


class _Config(NamedTuple):
    """Queries and keys of a block, warps of a program, depth of the loop's pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def _config(kind: str, dim: int, itemsize: int) -> _Config:
    """Fixed, so that no first call spends its time on tuning. ``kind``: ``rows`` (first pass) or ``columns``."""
    if itemsize == 4:
        return _Config(64 if dim <= 128 else 32, 32, 4, 2)
    if dim <= 128:
        return _Config(128, 64, 4, 3)
    return _Config(128, 64, 8, 2) if kind == "rows" else _Config(64, 64, 4, 2)


def _width(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _halves(x: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x [B, N, F]`` as ``scale * (high + low)``, the halves float16 with ``columns`` columns; scale ``[F]``."""
    x = x.float()
    _, power = torch.frexp(x.abs().amax((0, 1)))
    scale = torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)
    x = torch.nn.functional.pad(x / scale, (0, columns - x.shape[2]))
    high = x.half()
    return high.contiguous(), (x - high.float()).half().contiguous(), scale


def _bounds(spans: Spans | None, like: Tensor) -> Spans:
    """What the kernels read; nothing is read of the causal ones."""
    if spans is None:
        none = like.new_empty(0, dtype=torch.int32)
        return none, none
    lo, hi = (x.to(torch.int32).expand(like.shape[0], like.shape[2]).contiguous() for x in spans)
    return lo, hi


@operator("attention_statistics")
def _statistics_op(
    q: Tensor, k: Tensor, features: Tensor, lo: Tensor, hi: Tensor, scale: float, ranged: bool, distance: bool,
    peak: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, length, dim), (_, kv_heads, size, _) = q.shape, k.shape
    count = features.shape[2]
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    entropy, far = torch.empty_like(lse), torch.empty_like(lse) if distance else lse.new_empty(0)
    found = lse.new_empty(*lse.shape, count)
    top = torch.empty_like(lse) if peak else lse.new_empty(0)
    column = torch.empty_like(top, dtype=torch.int32)
    if q.numel() == 0 or size == 0:
        return (
            lse.fill_(-torch.inf), entropy.zero_(), far.zero_(), found.zero_(), top.fill_(-torch.inf), column.fill_(-1)
        )  # fmt: skip
    columns = max(16, triton.next_power_of_2(count)) if count else 0
    high, low, unit = _halves(features, columns) if count else (features, features, features)
    config = _config("rows", dim, q.element_size())
    group = heads // kv_heads
    launch(
        _probe.statistics, (triton.cdiv(length * group, config.rows), batch * kv_heads),
        q, k, high, low, lo, hi, lse, entropy, far, found, top, column, *_strides(q), *_strides(k),
        size * columns if features.shape[0] > 1 else 0, kv_heads, length, size, count, scale * LOG2E, G=group,
        D=dim, WIDTH=_width(dim), F=columns, FAR=distance, PEAK=peak, RANGED=ranged, M=config.rows,
        N=config.keys, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return lse, entropy, far, found.mul_(unit) if count else found, top, column


@_statistics_op.register_fake
def _(
    q: Tensor, k: Tensor, features: Tensor, lo: Tensor, hi: Tensor, scale: float, ranged: bool, distance: bool,
    peak: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    far, top = (torch.empty_like(rows) if asked else rows.new_empty(0) for asked in (distance, peak))
    found = rows.new_empty(*rows.shape, features.shape[2])
    return rows, torch.empty_like(rows), far, found, top, torch.empty_like(top, dtype=torch.int32)


@operator("attention_received")
def _received_op(
    q: Tensor, k: Tensor, lse: Tensor, weight: Tensor, lo: Tensor, hi: Tensor, scale: float, ranged: bool
) -> Tensor:
    (batch, heads, length, dim), (_, kv_heads, size, _) = q.shape, k.shape
    count = weight.shape[2]
    out = q.new_zeros(batch, heads, size, count, dtype=torch.float32)
    if q.numel() == 0 or out.numel() == 0:
        return out
    columns = max(16, triton.next_power_of_2(count))
    high, low, unit = _halves(weight, columns)
    config = _config("columns", dim, q.element_size())
    launch(
        _probe.received, (triton.cdiv(size, config.keys), batch * heads),
        q, k, high, low, lo, hi, lse, out, *_strides(q), *_strides(k),
        length * columns if weight.shape[0] > 1 else 0, heads, length, size, count, scale * LOG2E,
        G=heads // kv_heads, D=dim, WIDTH=_width(dim), F=columns, RANGED=ranged, M=config.rows, N=config.keys,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return out.mul_(unit)


@_received_op.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, weight: Tensor, lo: Tensor, hi: Tensor, scale: float, ranged: bool) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[2], weight.shape[2], dtype=torch.float32)


@operator("attention_band")
def _band_op(
    q: Tensor, k: Tensor, lse: Tensor, profile: Tensor, counted: Tensor, lo: Tensor, hi: Tensor, scale: float,
    ranged: bool, by_rows: bool, by_columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, heads, length, dim), (_, kv_heads, size, _) = q.shape, k.shape
    rows = torch.zeros_like(lse) if by_rows else lse.new_empty(0)
    columns = lse.new_zeros(batch, heads, size) if by_columns else lse.new_empty(0)
    if q.numel() == 0 or size == 0 or len(profile) == 0:
        return rows, columns
    keys = 64 if q.element_size() < 4 else 32
    about = (*_strides(q), *_strides(k))
    sizes = (heads, length, size, len(profile), scale * LOG2E)
    const = {
        "G": heads // kv_heads, "D": dim, "WIDTH": _width(dim), "RANGED": ranged, "M": keys, "N": keys, "num_warps": 4,
    }  # fmt: skip
    if by_rows:
        launch(
            _probe.band_rows, (triton.cdiv(length, keys), batch * heads),
            q, k, profile, lo, hi, lse, rows, *about, *sizes, **const,
        )  # fmt: skip
    if by_columns:
        launch(
            _probe.band_columns, (triton.cdiv(size, keys), batch * heads),
            q, k, profile, counted, lo, hi, lse, columns, *about, length if counted.shape[0] > 1 else 0, *sizes,
            **const,
        )  # fmt: skip
    return rows, columns


@_band_op.register_fake
def _(
    q: Tensor, k: Tensor, lse: Tensor, profile: Tensor, counted: Tensor, lo: Tensor, hi: Tensor, scale: float,
    ranged: bool, by_rows: bool, by_columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = torch.empty_like(lse) if by_rows else lse.new_empty(0)
    return rows, lse.new_empty(*lse.shape[:2], k.shape[2]) if by_columns else lse.new_empty(0)


@operator("attention_pool")
def _pool_op(
    q: Tensor, k: Tensor, lse: Tensor, cells: int, lo: Tensor, hi: Tensor, scale: float, ranged: bool
) -> Tensor:
    (batch, heads, length, dim), (_, kv_heads, size, _) = q.shape, k.shape
    high, wide = max(1, triton.cdiv(length, cells)), max(1, triton.cdiv(size, cells))
    out = lse.new_zeros(batch, heads, triton.cdiv(length, high), triton.cdiv(size, wide))
    if out.numel() == 0 or dim == 0:
        return out
    most = 64 if q.element_size() < 4 and dim <= 128 else 32
    rows, keys = (min(most, max(16, triton.next_power_of_2(n))) for n in (high, wide))
    launch(
        _probe.pooled, (out.shape[3], out.shape[2], batch * heads),
        q, k, lo, hi, lse, out, *_strides(q), *_strides(k), heads, length, size, high, wide, scale * LOG2E,
        G=heads // kv_heads, D=dim, WIDTH=_width(dim), RANGED=ranged, M=rows, N=keys, num_warps=4,
    )  # fmt: skip
    return out


@_pool_op.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, cells: int, lo: Tensor, hi: Tensor, scale: float, ranged: bool) -> Tensor:
    high, wide = -(-q.shape[2] // cells), -(-k.shape[2] // cells)
    return lse.new_empty(*lse.shape[:2], -(-q.shape[2] // high), -(-k.shape[2] // wide))


def _checked(q: Tensor, k: Tensor, scale: float, spans: Spans | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3] or q.dtype != k.dtype or not scale > 0:
        raise UserError(f"attention probe of q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, scale {scale}")
    lo, hi = _bounds(spans, q)
    return (q if q.stride(3) == 1 else q.contiguous()), (k if k.stride(3) == 1 else k.contiguous()), lo, hi


def row_statistics(
    q: Tensor, k: Tensor, *, scale: float, features: Tensor | None = None, distance: bool = False, peak: bool = False,
    spans: Spans | None = None,
) -> Rows:  # fmt: skip
    """Log-sum-exp, entropy and expected features of each row, in one pass over the keys (32 features a pass).

    Args:
        q: queries ``[B, H, T, d]``.
        k: keys ``[B, Hkv, S, d]`` of the same dtype: float32, bfloat16 or float16.
        scale: positive factor on ``q k^T``.
        features: ``[B or 1, S, F]``, exact to 22 bits of the greatest of each feature.
        distance, peak: whether the expected distance and the greatest logit are wanted.
        spans: what each query sees, where that is not all up to its own column.
    """
    q, k, lo, hi = _checked(q, k, scale, spans)
    parts = [q.new_zeros(1, k.shape[2], 0)] if features is None or not features.shape[2] else features.split(_MOST, 2)
    ranged = spans is not None
    made = [
        Rows(*_statistics_op(q, k, part, lo, hi, scale, ranged, distance and i == 0, peak and i == 0))
        for i, part in enumerate(parts)
    ]
    return made[0] if len(made) == 1 else made[0]._replace(found=torch.cat([rows.found for rows in made], 3))


def column_sum(
    q: Tensor, k: Tensor, lse: Tensor, weight: Tensor, *, scale: float, spans: Spans | None = None
) -> Tensor:  # fmt: skip
    """``sum over t of weight[t] A[t, s]``: ``[B, H, S, R]`` float32.

    Args:
        q, k, scale, spans: as for :func:`row_statistics`.
        lse: from there, of the same spans.
        weight: ``[B or 1, T, R]`` weights of the rows.
    """
    q, k, lo, hi = _checked(q, k, scale, spans)
    parts = [_received_op(q, k, lse, part, lo, hi, scale, spans is not None) for part in weight.split(_MOST, 2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def band(
    q: Tensor, k: Tensor, lse: Tensor, profile: Tensor, *, scale: float, queries: Tensor | None = None,
    by: Literal["rows", "columns", "both"] = "both", spans: Spans | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of the weights at the distances 0 to W - 1 times ``profile [W]``, by row and by key.

    Args:
        q, k, scale, spans: as for :func:`row_statistics`.
        lse: from there, of the same spans.
        profile: weights of the distances.
        queries: ``[B or 1, T]``, rows that count by key; None for all.
        by: which is wanted; the other is empty.

    Returns:
        ``[B, H, T]`` and ``[B, H, S]`` float32.
    """
    q, k, lo, hi = _checked(q, k, scale, spans)
    counted = lse.new_ones(1, q.shape[2]) if queries is None else queries.float().contiguous()
    profile = profile.to(device=q.device, dtype=torch.float32).contiguous()
    made: tuple[Tensor, Tensor] = _band_op(
        q, k, lse, profile, counted, lo, hi, scale, spans is not None, by != "columns", by != "rows"
    )
    return made


def pool(q: Tensor, k: Tensor, lse: Tensor, size: int, *, scale: float, spans: Spans | None = None) -> Tensor:
    """The map in at most ``size x size`` cells, each the mean of its weights (what lies outside of the map is 0).

    Args:
        q, k, scale, spans: as for :func:`row_statistics`.
        lse: from there, of the same spans.
        size: the most rows and columns.
    """
    q, k, lo, hi = _checked(q, k, scale, spans)
    made: Tensor = _pool_op(q, k, lse, size, lo, hi, scale, spans is not None)
    return made
