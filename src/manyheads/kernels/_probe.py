# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The Triton kernels of :mod:`manyheads.kernels.probe`, where their method and names stand.

Constants of a launch: M queries (rows) and N keys of a block; WIDTH columns that hold the D channels; F columns that
hold the features or row weights; G query heads share a key/value head; RANGED: rows see the keys ``lo <= n < hi`` that
are given, and not the causal ones.
"""

import triton
import triton.language as tl

from .accumulated_attention import _keys, _rows

__all__ = ["band_columns", "band_rows", "pooled", "received", "statistics"]

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_RAISE = tl.constexpr(16384.0)  # float16 reaches from 2^-24 to 2^16: so weights do from 2^-38 of a row's greatest on,
_LIFT = tl.constexpr(2048.0)  # and with what rounding took from them, held apart and greater, from 2^-49 on


@triton.jit
def _span(lo_ptr, hi_ptr, t, T, S, RANGED: tl.constexpr):
    """First key and end of the keys that the queries ``t`` see; none for a query past the last."""
    if RANGED:
        lo = tl.load(lo_ptr + t, mask=t < T, other=0)
        hi = tl.load(hi_ptr + t, mask=t < T, other=0)
    else:
        lo = t * 0
        hi = tl.where(t < T, t + (S - T + 1), 0)
    return lo, hi


@triton.jit
def _sums(p, acc, tail, high_ptr, low_ptr, i, count, F: tl.constexpr):
    """``acc + tail / _LIFT`` grow by ``p @ x``, p at most 1 and x in two halves: all products are of float16."""
    at = i.to(tl.int64)[:, None] * F + tl.arange(0, F)[None, :]
    held = (i < count)[:, None]
    high = tl.load(high_ptr + at, mask=held, other=0.0)
    low = tl.load(low_ptr + at, mask=held, other=0.0)
    p = p * _RAISE
    first = p.to(tl.float16)
    rest = ((p - first.to(tl.float32)) * _LIFT).to(tl.float16)
    acc = tl.dot(first, high, acc)
    acc = tl.dot(first, low, acc)
    return acc, tl.dot(rest, high, tail)


@triton.jit
def _statistics_step(
    q, lo, hi, own, top, column, total, heat, far, found, tail, k_ptr, high_ptr, low_ptr, first, k_row, S, factor,
    D: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, FAR: tl.constexpr, PEAK: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """One block of keys: the sums are those of ``2^(x - top)`` and move along when ``top`` does."""
    n = first + tl.arange(0, N)
    x = tl.dot(q, tl.trans(_keys(k_ptr, first, k_row, S, D, WIDTH, N)), input_precision="tf32x3")
    if MASK:
        x = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), x, float("-inf"))
    if PEAK:
        most, at = tl.max(x, 1, return_indices=True)
        column = tl.where(most * factor > top, first + at, column)  # of equal ones the first
    else:
        most = tl.max(x, 1)
    new = tl.maximum(top, most * factor)
    base = tl.where(new == float("-inf"), 0.0, new)
    fade = tl.exp2(top - base)
    y = x * factor - base[:, None]
    p = tl.exp2(y)
    total = total * fade
    heat = heat * fade + tl.where(total > 0.0, top - base, 0.0) * total
    if MASK:
        y = tl.maximum(y, -1e4)  # 0 times infinity is no number
    heat += tl.sum(p * y, 1)
    total += tl.sum(p, 1)
    if FAR:
        far = far * fade + tl.sum(p * (own[:, None] - n[None, :]).to(tl.float32), 1)
    if F > 0:
        found, tail = _sums(p, found * fade[:, None], tail * fade[:, None], high_ptr, low_ptr, n, S, F)
    return new, column, total, heat, far, found, tail


@triton.jit(do_not_specialize=["T", "S", "count"])
def statistics(
    q_ptr, k_ptr, high_ptr, low_ptr, lo_ptr, hi_ptr, lse_ptr, entropy_ptr, far_ptr, found_ptr, peak_ptr, column_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, features_batch, HEADS, T, S, count, factor, G: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, FAR: tl.constexpr, PEAK: tl.constexpr, RANGED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (rows, pair): log-sum-exp, entropy, distance, peak ``[B, H, T]``, features ``[B, H, T, count]``."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the rows that see most start first
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // HEADS
    q_ptr += batch * q_batch + pair % HEADS * G * q_head
    k_ptr += batch * k_batch + pair % HEADS * k_head
    high_ptr += batch * features_batch
    low_ptr += batch * features_batch
    q, t = _rows(q_ptr, first, q_head, q_row, T, G, D, WIDTH, M)
    lo, hi = _span(lo_ptr + batch * T, hi_ptr + batch * T, t, T, S, RANGED)
    if RANGED:  # keys before `some` and from `most` on are seen by no row, those from `full` to `least` by all
        some = tl.min(tl.where(t < T, lo, S), 0) // N * N
        full = tl.cdiv(tl.max(lo, 0), N) * N
        least = tl.min(tl.where(t < T, hi, S), 0) // N * N
        most = tl.max(hi, 0)
    else:
        some = 0
        full = 0
        least = tl.maximum(first // G + S - T + 1, 0) // N * N
        most = tl.minimum((first + M - 1) // G, T - 1) + S - T + 1
    last = tl.maximum(full, tl.minimum(least, most))
    top = tl.full([M], float("-inf"), tl.float32)
    column = tl.full([M], -1, tl.int32)
    total = tl.zeros([M], tl.float32)
    heat = tl.zeros([M], tl.float32)
    far = tl.zeros([M], tl.float32)
    own = t + (S - T)
    found = tl.zeros([M, F if F > 0 else 1], tl.float32)
    tail = found
    if RANGED:
        for n in tl.range(some, tl.minimum(full, most), N, num_stages=STAGES):
            top, column, total, heat, far, found, tail = _statistics_step(
                q, lo, hi, own, top, column, total, heat, far, found, tail, k_ptr, high_ptr, low_ptr, n, k_row, S,
                factor, D, WIDTH, F, FAR, PEAK, N, True,
            )  # fmt: skip
    for n in tl.range(full, last, N, num_stages=STAGES):
        top, column, total, heat, far, found, tail = _statistics_step(
            q, lo, hi, own, top, column, total, heat, far, found, tail, k_ptr, high_ptr, low_ptr, n, k_row, S,
            factor, D, WIDTH, F, FAR, PEAK, N, False,
        )  # fmt: skip
    for n in tl.range(last, most, N, num_stages=STAGES):
        top, column, total, heat, far, found, tail = _statistics_step(
            q, lo, hi, own, top, column, total, heat, far, found, tail, k_ptr, high_ptr, low_ptr, n, k_row, S,
            factor, D, WIDTH, F, FAR, PEAK, N, True,
        )  # fmt: skip
    r = first + tl.arange(0, M)
    at = (pair * G + r % G) * T + t
    some_seen = total > 0.0
    total = tl.where(some_seen, total, 1.0)
    log = tl.log2(total)
    tl.store(lse_ptr + at, tl.where(some_seen, (top + log) * _LN2, float("-inf")), mask=t < T)
    tl.store(entropy_ptr + at, (log - heat / total) * _LN2, mask=t < T)
    if PEAK:
        tl.store(peak_ptr + at, top * _LN2, mask=t < T)
        tl.store(column_ptr + at, column, mask=t < T)
    if FAR:
        tl.store(far_ptr + at, far / total, mask=t < T)
    if F > 0:
        c = tl.arange(0, F)
        held = (t < T)[:, None] & (c < count)[None, :]
        tl.store(
            found_ptr + at[:, None] * count + c[None, :], (found + tail / _LIFT) / (total * _RAISE)[:, None], mask=held
        )


@triton.jit
def _weights(
    k, n, q_ptr, lse_ptr, lo_ptr, hi_ptr, first, q_row, T, S, factor, D: tl.constexpr, WIDTH: tl.constexpr,
    RANGED: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Softmax weights ``[N, M]`` of one head's queries ``first ..`` on the keys ``n``, and the queries' numbers."""
    q, t = _rows(q_ptr, first, 0, q_row, T, 1, D, WIDTH, M)
    lse = tl.load(lse_ptr + t, mask=t < T, other=float("inf")) * _LOG2E
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="tf32x3") * factor - lse[None, :])
    if MASK:
        lo, hi = _span(lo_ptr, hi_ptr, t, T, S, RANGED)
        p = tl.where((n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :]), p, 0.0)
    return p, t


@triton.jit(do_not_specialize=["T", "S", "count"])
def received(
    q_ptr, k_ptr, high_ptr, low_ptr, lo_ptr, hi_ptr, lse_ptr, out_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row,
    weights_batch, HEADS, T, S, count, factor, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    F: tl.constexpr, RANGED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (keys, query head): weights on N keys times the weights of the rows; out ``[B, H, S, count]``."""
    start = tl.program_id(0) * N  # early keys are seen by most rows and start first
    head = tl.program_id(1).to(tl.int64)
    batch = head // HEADS
    q_ptr += batch * q_batch + head % HEADS * q_head
    k_ptr += batch * k_batch + head % HEADS // G * k_head
    high_ptr += batch * weights_batch
    low_ptr += batch * weights_batch
    lse_ptr += head * T
    lo_ptr += batch * T
    hi_ptr += batch * T
    k = _keys(k_ptr, start, k_row, S, D, WIDTH, N)
    n = start + tl.arange(0, N)
    acc = tl.zeros([N, F], tl.float32)
    tail = acc
    if RANGED:
        some = 0
        full = T
    else:
        some = tl.minimum(tl.maximum(start - (S - T), 0), T) // M * M  # rows that see the first key, and the last one
        full = tl.minimum(tl.cdiv(tl.maximum(start + N - 1 - (S - T), 0), M) * M, T)
    for r in tl.range(some, full, M, num_stages=STAGES):
        p, t = _weights(k, n, q_ptr, lse_ptr, lo_ptr, hi_ptr, r, q_row, T, S, factor, D, WIDTH, RANGED, M, True)
        acc, tail = _sums(p, acc, tail, high_ptr, low_ptr, t, T, F)
    if not RANGED:
        for r in tl.range(full, T, M, num_stages=STAGES):
            p, t = _weights(k, n, q_ptr, lse_ptr, lo_ptr, hi_ptr, r, q_row, T, S, factor, D, WIDTH, RANGED, M, False)
            acc, tail = _sums(p, acc, tail, high_ptr, low_ptr, t, T, F)
    c = tl.arange(0, F)
    at = (head * S + n)[:, None] * count + c[None, :]
    tl.store(out_ptr + at, (acc + tail / _LIFT) / _RAISE, mask=(n < S)[:, None] & (c < count)[None, :])


@triton.jit
def _near(profile_ptr, t, n, T, S, span):
    """The profile's weight ``[N, M]`` of the distance of each pair."""
    back = (t + (S - T))[None, :] - n[:, None]
    return tl.load(profile_ptr + back, mask=(back >= 0) & (back < span), other=0.0)


@triton.jit(do_not_specialize=["T", "S", "span"])
def band_rows(
    q_ptr, k_ptr, profile_ptr, lo_ptr, hi_ptr, lse_ptr, out_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, HEADS,
    T, S, span, factor, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, RANGED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Program (rows, query head): ``sum over j of profile[j] A[t, t - j]`` of M rows; out ``[B, H, T]``."""
    first = tl.program_id(0) * M
    head = tl.program_id(1).to(tl.int64)
    batch = head // HEADS
    q_ptr += batch * q_batch + head % HEADS * q_head
    k_ptr += batch * k_batch + head % HEADS // G * k_head
    lse_ptr += head * T
    total = tl.zeros([M], tl.float32)
    here = first + S - T
    stop = tl.minimum(here + M, S)
    for start in tl.range(tl.maximum(here - span + 1, 0) // N * N, stop, N):
        n = start + tl.arange(0, N)
        k = _keys(k_ptr, start, k_row, S, D, WIDTH, N)
        p, t = _weights(
            k, n, q_ptr, lse_ptr, lo_ptr + batch * T, hi_ptr + batch * T, first, q_row, T, S, factor, D, WIDTH, RANGED,
            M, True,
        )  # fmt: skip
        total += tl.sum(p * _near(profile_ptr, t, n, T, S, span), 0)
    t = first + tl.arange(0, M)
    tl.store(out_ptr + head * T + t, total, mask=t < T)


@triton.jit(do_not_specialize=["T", "S", "span"])
def band_columns(
    q_ptr, k_ptr, profile_ptr, counted_ptr, lo_ptr, hi_ptr, lse_ptr, out_ptr, q_batch, q_head, q_row, k_batch, k_head,
    k_row, counted_batch, HEADS, T, S, span, factor, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    RANGED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (keys, query head): ``sum over j of profile[j] A[s + j, s]`` over counted rows; out ``[B, H, S]``."""
    start = tl.program_id(0) * N
    head = tl.program_id(1).to(tl.int64)
    batch = head // HEADS
    q_ptr += batch * q_batch + head % HEADS * q_head
    k_ptr += batch * k_batch + head % HEADS // G * k_head
    lse_ptr += head * T
    counted_ptr += batch * counted_batch
    k = _keys(k_ptr, start, k_row, S, D, WIDTH, N)
    n = start + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    here = start - (S - T)  # the row that stands at the first key
    for r in tl.range(tl.maximum(here, 0) // M * M, tl.minimum(here + N - 1 + span, T), M):
        p, t = _weights(
            k, n, q_ptr, lse_ptr, lo_ptr + batch * T, hi_ptr + batch * T, r, q_row, T, S, factor, D, WIDTH, RANGED, M,
            True,
        )  # fmt: skip
        counted = tl.load(counted_ptr + t, mask=t < T, other=0.0)
        total += tl.sum(p * _near(profile_ptr, t, n, T, S, span) * counted[None, :], 1)
    tl.store(out_ptr + head * S + n, total, mask=n < S)


@triton.jit(do_not_specialize=["T", "S", "high", "wide"])
def pooled(
    q_ptr, k_ptr, lo_ptr, hi_ptr, lse_ptr, out_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, HEADS, T, S, high,
    wide, factor, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, RANGED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Program (cell of columns, cell of rows, query head): sum of the weights in a cell, high x wide of them."""
    left, above = tl.program_id(0) * wide, tl.program_id(1) * high
    head = tl.program_id(2).to(tl.int64)
    batch = head // HEADS
    q_ptr += batch * q_batch + head % HEADS * q_head
    k_ptr += batch * k_batch + head % HEADS // G * k_head
    lse_ptr += head * T
    right, below = tl.minimum(left + wide, S), tl.minimum(above + high, T)
    if not RANGED:
        above = tl.minimum(tl.maximum(above, left - (S - T)), below)  # the first row of the cell that sees any of it
    total = tl.zeros([N], tl.float32)
    for start in tl.range(left, right, N):
        n = start + tl.arange(0, N)
        k = _keys(k_ptr, start, k_row, S, D, WIDTH, N)
        for r in tl.range(above, below, M):
            p, t = _weights(
                k, n, q_ptr, lse_ptr, lo_ptr + batch * T, hi_ptr + batch * T, r, q_row, T, S, factor, D, WIDTH, RANGED,
                M, True,
            )  # fmt: skip
            total += tl.sum(tl.where((n < right)[:, None] & (t < below)[None, :], p, 0.0), 1)
    cell = (head * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr + cell, tl.sum(total, 0) / (high * wide))
