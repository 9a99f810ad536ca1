# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Gradients of the keys and values of block-sparse attention in Triton, along the lists of :mod:`._block_sparse`, where
the constants of a launch are named; TILE: keys of a list.
"""

import triton
import triton.language as tl

from ._block_sparse import _LOG2E, _allowed, _bits, _marks, _places, _tile

__all__ = ["backward_keys"]


@triton.jit
def _keys_step(
    k, v, s, place, bias, theirs, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, list_ptr, bits_ptr, word_ptr, mine_ptr,
    start, left, whole, stop, q_row, do_row, T, shift, window, factor, D: tl.constexpr, DV: tl.constexpr,
    WD: tl.constexpr, WV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, DOCS: tl.constexpr, TILED: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """All tiles have keys before queries ``[N, M]``, so that no product is transposed after it was made."""
    n, at, t, held = _places(list_ptr, start, left, whole, stop, BQ, M, ASM, MASK)
    held = held & (t < T)
    q = _tile(q_ptr, at, t, q_row, held, D, WD, M, BQ % M == 0, MASK)
    do = _tile(do_ptr, at, t, do_row, held, DV, WV, M, BQ % M == 0, MASK)
    if MASK:
        lse = tl.load(lse_ptr + t, mask=held, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse) * _LOG2E
        delta = tl.load(delta_ptr + t, mask=held, other=0.0)
    else:
        lse = tl.load(lse_ptr + t) * _LOG2E
        delta = tl.load(delta_ptr + t)
    x = tl.dot(k, tl.trans(q), input_precision="tf32x3") * factor
    if BIAS:
        x += bias[:, None]
    if MASK:
        seen = _allowed((t + shift)[None, :] - s[:, None], window, CAUSAL, WINDOW) & held[None, :]
        if DOCS:
            seen = seen & (theirs[:, None] == tl.load(mine_ptr + t, mask=held, other=-2)[None, :])
        if BITS:
            bits = tl.load(bits_ptr + n // BQ, mask=held, other=0)
            seen = seen & (((bits[None, :] >> (place // BK).to(tl.int64)[:, None]) & 1) != 0)
        if TILED:
            words = word_ptr + tl.cast(start // BQ, tl.int64) * (BQ * BK // 32)
            seen = seen & _bits(words, place, start % BQ, M, BQ)
        x = tl.where(seen, x, float("-inf"))
    p = tl.exp2(x - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="tf32x3")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="tf32x3") - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit(
    do_not_specialize=["T", "S", "TILES", "W", "window", "list_batch", "list_head", "order_batch", "order_head"]
)
def backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, list_ptr, span_ptr, order_ptr, bits_ptr, word_ptr,
    base_ptr, bias_ptr, mine_ptr, theirs_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, list_batch, list_head, order_batch,
    order_head, bias_batch, bias_head, mine_batch, theirs_batch, HEADS, T, S, TILES, W, window, factor, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WV: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BIAS: tl.constexpr, DOCS: tl.constexpr, TILED: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (part of a tile of keys, key head): gradients of N keys and values over the query heads of the group."""
    parts: tl.constexpr = TILE // N
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    tile = tl.load(order_ptr + b * order_batch + h * order_head + tl.program_id(0) // parts)
    begin = tile * TILE + tl.program_id(0) % parts * N
    place = tl.program_id(0) % parts * N + tl.arange(0, N)
    s = tile * TILE + place
    real = s < S
    k = _tile(k_ptr + b * k_batch + h * k_head, begin, s, k_row, real, D, WD, N, True, True)
    v = _tile(v_ptr + b * v_batch + h * v_head, begin, s, v_row, real, DV, WV, N, True, True)
    theirs = s
    if DOCS:
        theirs = tl.load(theirs_ptr + b * theirs_batch + s, mask=real, other=-1)
    mine_ptr += b * mine_batch
    if TILED:
        word_ptr += tl.load(base_ptr + tile).to(tl.int64) * (BQ * BK // 32)
    dk = tl.zeros([N, WD], tl.float32)
    dv = tl.zeros([N, WV], tl.float32)
    for g in range(G):
        head = h * G + g
        lists = b * list_batch + head * list_head + tile
        base = (b * HEADS * G + head) * T
        q_at = q_ptr + b * q_batch + head * q_head
        do_at = do_ptr + b * do_batch + head * do_head
        bias = tl.zeros([N], tl.float32)
        if BIAS:
            at = bias_ptr + b * bias_batch + head * bias_head + s
            bias = tl.load(at, mask=real, other=0.0).to(tl.float32) * _LOG2E
        first, left, whole, stop = _marks(span_ptr + lists * 4, BQ, M, BIAS or DOCS or BITS)
        if not (BIAS or DOCS or BITS):
            for n in tl.range(left, left + whole, M, num_stages=STAGES):
                dk, dv = _keys_step(
                    k, v, s, place, bias, theirs, dk, dv, q_at, do_at, lse_ptr + base, delta_ptr + base,
                    list_ptr + lists * W, bits_ptr + lists * W, word_ptr, mine_ptr, n, left, whole, stop, q_row,
                    do_row, T, S - T, window, factor, D, DV, WD, WV, BQ, BK, M, CAUSAL, WINDOW, BIAS, DOCS, TILED, BITS,
                    ASM, False,
                )  # fmt: skip
        for n in tl.range(first, stop - whole, M, num_stages=STAGES):
            dk, dv = _keys_step(
                k, v, s, place, bias, theirs, dk, dv, q_at, do_at, lse_ptr + base, delta_ptr + base,
                list_ptr + lists * W, bits_ptr + lists * W, word_ptr, mine_ptr, n, left, whole, stop, q_row, do_row, T,
                S - T, window, factor, D, DV, WD, WV, BQ, BK, M, CAUSAL, WINDOW, BIAS, DOCS, TILED, BITS, ASM, True,
            )  # fmt: skip
    c = tl.arange(0, WD)[None, :]
    spot = dk_ptr + b * dk_batch + h * dk_head + s.to(tl.int64)[:, None] * dk_row + c
    tl.store(spot, (dk * scale).to(dk_ptr.dtype.element_ty), mask=real[:, None] & (c < D))
    c = tl.arange(0, WV)[None, :]
    spot = dv_ptr + b * dv_batch + h * dv_head + s.to(tl.int64)[:, None] * dv_row + c
    tl.store(spot, dv.to(dv_ptr.dtype.element_ty), mask=real[:, None] & (c < DV))
