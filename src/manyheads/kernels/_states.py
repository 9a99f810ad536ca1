# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The smaller Triton kernels of :mod:`manyheads.kernels.recurrence`: states between segments, gates, one token."""

import triton
import triton.language as tl

from ._recurrence import _EPS, _LOG2E, _tile, _where

__all__ = ["delta", "gate", "scan", "step"]


@triton.jit(do_not_specialize=["per", "sequences"])
def scan(
    rows_ptr, decay_ptr, start_ptr, start_n_ptr, end_ptr, end_n_ptr, first_ptr, per,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
    GIVEN: tl.constexpr, GIVEN_N: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (sequence and head, cells): what each segment adds becomes what stands before (after) it.

    Where sequences are WHOLE, only the state that is given gets its place.
    """
    n = (tl.program_id(0) // HEADS).to(tl.int64)
    h = tl.program_id(0) % HEADS
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PACKED:
        first = tl.load(first_ptr + n)
        count = tl.load(first_ptr + n + 1) - first
    else:
        first = n.to(tl.int32) * per
        count = per
    at = n * HEADS + h
    state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        state += tl.load(start_ptr + at * KV + c, mask=c < KV, other=0.0)
    if GIVEN_N:
        state += tl.load(start_n_ptr + at * (SIZE - KV) + c - KV, mask=(c >= KV) & (c < SIZE), other=0.0)
    forth = -1 if REVERSE else 1
    place = (first + n + (count if REVERSE else 0)) * HEADS + h
    spot = rows_ptr + place * SIZE + c
    decay_ptr += (first.to(tl.int64) + (count - 1 if REVERSE else 0)) * HEADS + h
    tl.store(spot, state, mask=c < SIZE)
    for _ in tl.range(0, 0 if WHOLE else count, num_stages=4):
        spot += forth * HEADS * SIZE
        new = tl.load(spot, mask=c < SIZE, other=0.0)
        if GATED:
            state = state * tl.exp2(tl.load(decay_ptr)) + new
            decay_ptr += forth * HEADS
        else:
            state += new
        tl.store(spot, state, mask=c < SIZE)
    if not WHOLE:
        tl.store(end_ptr + at * KV + c, state, mask=c < KV)
    if SIZE != KV and not WHOLE:
        tl.store(end_n_ptr + at * (SIZE - KV) + c - KV, state, mask=(c >= KV) & (c < SIZE))


@triton.jit(do_not_specialize=["T"])
def delta(
    o_ptr, do_ptr, below_ptr, floor_ptr, r_ptr, c_ptr, dfloor_ptr, o_b, o_h, o_t, do_b, do_h, do_t, T,
    HEADS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr, MLSTM: tl.constexpr,
):  # fmt: skip
    """Program (rows, head): the factor 1 / d on the gradient of the output, and the gradient of the normaliser."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // HEADS
    h = pair % HEADS
    o = _tile(o_ptr + b * o_b + h * o_h, t, o_t, T, 0, V, BV).to(tl.float32)
    do = _tile(do_ptr + b * do_b + h * do_h, t, do_t, T, 0, V, BV).to(tl.float32)
    at = pair * T + t
    below = tl.load(below_ptr + at, mask=t < T, other=1.0)
    if MLSTM:
        floor = tl.load(floor_ptr + at, mask=t < T, other=1.0)
        size = tl.abs(below)
        wins = tl.where(size > floor, 1.0, tl.where(size == floor, 0.5, 0.0))  # as torch.maximum shares a tie
        r = 1.0 / (tl.maximum(size, floor) + _EPS)
        slope = -tl.sum(o * do, 1) * r
        tl.store(dfloor_ptr + at, slope * (1.0 - wins), mask=t < T)
        slope *= wins * tl.where(below > 0, 1.0, tl.where(below < 0, -1.0, 0.0))
    else:
        r = 1.0 / (below + _EPS)
        slope = -tl.sum(o * do, 1) * r
    tl.store(r_ptr + at, r, mask=t < T)
    tl.store(c_ptr + at, slope, mask=t < T)


@triton.jit(do_not_specialize=["T", "L", "per", "sequences", "batch"])
def gate(
    rows_ptr, drows_ptr, dq_ptr, dk_ptr, dg_ptr, owner_ptr, first_ptr, cu_ptr, T, L, per, sequences, batch,
    HEADS: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Program (segment, head): dg_t = <S, dS> after the segment + sum of q_u dq_u - k_u dk_u from u = t to its end."""
    s = tl.program_id(0) // HEADS
    h = tl.program_id(0) % HEADS
    if PACKED:  # noqa: SIM102 - a constant, and a number on the device
        if tl.load(owner_ptr + s) >= sequences:
            return
    n, b, begin, stop = _where(s, owner_ptr, first_ptr, cu_ptr, T, L, per, PACKED)
    spot = ((s + n + 1) * HEADS + h) * SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        c = first + tl.arange(0, BLOCK)
        after = tl.load(rows_ptr + spot + c, mask=c < SIZE, other=0.0)
        acc += after * tl.load(drows_ptr + spot + c, mask=c < SIZE, other=0.0)
    later = tl.sum(acc, 0)
    count = tl.cdiv(stop - begin, C)
    for step in range(count):
        t = begin + (count - 1 - step) * C + tl.arange(0, C)
        e = tl.zeros([C], tl.float32)
        for tile in range(TILES):
            row = batch.to(tl.int64) * tile + b
            for j in range(G):
                at = (row * (HEADS * G) + h * G + j) * T
                e += tl.load(dq_ptr + at + t, mask=t < stop, other=0.0)
            at = (row * HEADS + h) * T
            e -= tl.load(dk_ptr + at + t, mask=t < stop, other=0.0)
        tl.store(dg_ptr + (b * HEADS + h) * T + t, later + tl.cumsum(e, 0, reverse=True), mask=t < stop)
        later += tl.sum(e, 0)


@triton.jit
def step(
    q_ptr, k_ptr, v_ptr, g_ptr, floor_ptr, kv_ptr, n_ptr, out_ptr, new_ptr, new_n_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, scale,
    HEADS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, GIVEN: tl.constexpr, GIVEN_N: tl.constexpr,
):  # fmt: skip
    """Program (row and key/value head, columns): one token."""
    pair = tl.program_id(0).to(tl.int64)
    b = pair // HEADS
    h = pair % HEADS
    u = tl.arange(0, BK)
    c = tl.program_id(1) * BV + tl.arange(0, BV)
    k = tl.load(k_ptr + b * k_b + h * k_h + u, mask=u < K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_b + h * v_h + c, mask=c < V, other=0.0).to(tl.float32)
    fade = 1.0
    if GATE:
        fade = tl.exp2(tl.load(g_ptr + b * g_b + h * g_h).to(tl.float32) * _LOG2E)
    state = k[:, None] * v[None, :]
    cells = pair * (K * V) + u[:, None] * V + c[None, :]
    inside = (u < K)[:, None] & (c < V)[None, :]
    if GIVEN:
        state += fade * tl.load(kv_ptr + cells, mask=inside, other=0.0)
    tl.store(new_ptr + cells, state, mask=inside)
    sums = k
    if GIVEN_N:
        sums += fade * tl.load(n_ptr + pair * K + u, mask=u < K, other=0.0)
    if NORM != "":  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(new_n_ptr + pair * K + u, sums, mask=u < K)
    for j in range(G):
        head = h * G + j
        q = tl.load(q_ptr + b * q_b + head * q_h + u, mask=u < K, other=0.0).to(tl.float32) * scale
        out = tl.sum(q[:, None] * state, 0)
        if NORM != "":
            below = tl.sum(q * sums, 0)
            if NORM == "mlstm":
                below = tl.maximum(tl.abs(below), tl.load(floor_ptr + pair * G + j))
            out = out / (below + _EPS)
        tl.store(out_ptr + (pair * G + j) * V + c, out.to(out_ptr.dtype.element_ty), mask=c < V)
