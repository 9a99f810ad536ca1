# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Gradients of the queries of block-sparse attention for Hopper, in programs like those of
:mod:`._block_sparse_hopper`.

``rows`` ``[2, B H, P]``, P a multiple of 128 and at least T, are the log-sum-exp over ln 2 (infinite where there is no
query, or none that sees a key) and ``do . out - dlse`` of each query.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._block_sparse_hopper import _bits, _key, _marks, _places, _read, _row, _write

__all__ = ["queries", "rows"]


@triton.jit(do_not_specialize=["T", "P"])
def rows(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, rows_ptr, o_batch, o_head, o_row, do_batch, do_head, do_row, HEADS, T, P, PAIRS,
    D: tl.constexpr, M: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """Program (M queries, head): what the passes for queries and keys both need of them."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    t = tl.program_id(0) * M + tl.arange(0, M)
    c = tl.arange(0, D)[None, :]
    real = t < T
    at = t.to(tl.int64)[:, None]
    o = tl.load(out_ptr + b * o_batch + h * o_head + at * o_row + c, mask=real[:, None], other=0.0)
    do = tl.load(do_ptr + b * do_batch + h * do_head + at * do_row + c, mask=real[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + pair * T + t, mask=real, other=0.0)
    lse = tl.load(lse_ptr + pair * T + t, mask=real, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634
    tl.store(rows_ptr + pair * P + t, lse, mask=t < P)
    tl.store(rows_ptr + (PAIRS + pair) * P + t, delta, mask=t < P)


@gluon.jit
def _unseen(
    x, query, s, S, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Zero where the rule hides a key; queries and keys are broadcast."""
    seen = (s < S) & (query == query)
    if CAUSAL:
        seen = seen & (s <= query)
    elif WINDOW:
        seen = seen & (s < query + window)
    if WINDOW:
        seen = seen & (s > query - window)
    return gl.where(seen, x, 0.0)


@gluon.jit
def _fetch_queries(
    q, k, v, do, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, next_ptr, list_ptr, span_ptr, order_ptr,
    list_batch, list_head, HEADS, ROWS, W, TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: keys, then values of each tile."""
    at = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < TILES:
        b, h, list_, begin = _row(tile, order_ptr, list_batch, list_head, HEADS, ROWS, BQ)
        tile = gl.num_programs(0) + gl.atomic_add(next_ptr, 1, sem="relaxed")
        first, left, masked, count = _marks(span_ptr, list_, BK, N)
        list_at = list_ptr + list_.to(gl.int64) * W
        key = 0
        if count > 0:
            key = _key(0, list_at, first, left, masked, count, BK, N)
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), turn % 2 ^ 1)
        _write(notes, b, h, begin, masked, count, key, list_)
        for group in gl.static_range(2):
            mbarrier.expect(q_full.index(group), 2 * 64 * D * 2)
            place = [b, h, begin + group * 64, 0]
            tma.async_copy_global_to_shared(q, place, q_full.index(group), q_smem.index(group))
            tma.async_copy_global_to_shared(do, place, q_full.index(group), do_smem.index(group))
        for j in range(count):
            if j > 0:
                key = _key(j, list_at, first, left, masked, count, BK, N)
            slot = at % STAGES
            mbarrier.wait(empty.index(slot), at // STAGES % 2 ^ 1)
            mbarrier.expect(full.index(slot), N * D * 2)
            tma.async_copy_global_to_shared(k, [b, h // G, key, 0], full.index(slot), ring.index(slot))
            slot = (at + 1) % STAGES
            mbarrier.wait(empty.index(slot), (at + 1) // STAGES % 2 ^ 1)
            mbarrier.expect(full.index(slot), N * D * 2)
            tma.async_copy_global_to_shared(v, [b, h // G, key, 0], full.index(slot), ring.index(slot))
            at += 2
        turn += 1
    for group in gl.static_range(2):
        mbarrier.wait(q_empty.index(group), turn % 2 ^ 1)
    _write(notes, 0, 0, 0, 0, -1, 0, 0)
    for group in gl.static_range(2):
        mbarrier.arrive(q_full.index(group))


@gluon.jit
def _queries_step(
    q, do, acc, lse, delta, at, ring, full, empty, query, key, words, S, window, factor, D: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TILED: gl.constexpr,
    MASK: gl.constexpr, X: gl.constexpr, Y: gl.constexpr,
):  # fmt: skip
    """Gradient of 64 queries from a tile of keys."""
    slot = at % STAGES
    mbarrier.wait(full.index(slot), at // STAGES % 2)
    k = ring.index(slot).reshape([N, D])
    x = warpgroup_mma(q, k.permute([1, 0]), gl.zeros([64, N], gl.float32, X), use_acc=False, is_async=True)
    slot_v = (at + 1) % STAGES
    mbarrier.wait(full.index(slot_v), (at + 1) // STAGES % 2)
    v = ring.index(slot_v).reshape([N, D]).permute([1, 0])
    y = warpgroup_mma(do, v, gl.zeros([64, N], gl.float32, X), use_acc=False, is_async=True)
    x = warpgroup_mma_wait(1, [x])
    p = gl.exp2(x * factor - lse[:, None])
    if MASK:
        if TILED:
            p = gl.where(_bits(words, N, X), p, 0.0)
        else:
            s = key + gl.arange(0, N, gl.SliceLayout(0, X))
            p = _unseen(p, query[:, None], s[None, :], S, window, CAUSAL, WINDOW)
    y = warpgroup_mma_wait(0, [y])
    mbarrier.arrive(empty.index(slot_v))
    ds = gl.convert_layout((p * (y - delta[:, None])).to(ring.dtype), gl.DotOperandLayout(0, Y, 2))
    acc = warpgroup_mma(ds, k, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(empty.index(slot))
    return acc, at + 2


@gluon.jit
def _attend_queries(
    GROUP: gl.constexpr, dq, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, rows_ptr, list_ptr, span_ptr,
    dq_ptr, dq_batch, dq_head, dq_row, word_ptr, base_ptr, HEADS, T, S, P, PAIRS, W, window, factor, scale,
    D: gl.constexpr, BK: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TILED: gl.constexpr,
    ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each tile."""
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    Y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    at = 0
    turn = 0
    q = q_smem.index(GROUP).reshape([64, D])
    do = do_smem.index(GROUP).reshape([64, D])
    mbarrier.wait(q_full.index(GROUP), 0)
    b, h, begin, masked, count, key, list_ = _read(notes)
    while count >= 0:
        words = word_ptr
        if TILED:
            words += gl.load(base_ptr + begin // 128).to(gl.int64) * 512 + GROUP * 256
        begin += GROUP * 64
        t = begin + gl.arange(0, 64, gl.SliceLayout(1, X))
        row = rows_ptr + (b * HEADS + h).to(gl.int64) * P + t
        lse = gl.load(row)
        delta = gl.load(row + PAIRS.to(gl.int64) * P)
        query = t + (S - T)
        acc = gl.zeros([64, D], gl.float32, Y)
        for j in range(masked):
            if j > 0:
                first, left, _masked, _count = _marks(span_ptr, list_, BK, N)
                key = _key(j, list_ptr + list_.to(gl.int64) * W, first, left, masked, count, BK, N)
            acc, at = _queries_step(
                q, do, acc, lse, delta, at, ring, full, empty, query, key, words + j * 512, S, window, factor, D, N,
                STAGES, CAUSAL, WINDOW, TILED, True, X, Y,
            )  # fmt: skip
        for _j in range(masked, count):
            acc, at = _queries_step(
                q, do, acc, lse, delta, at, ring, full, empty, query, 0, words, S, window, factor, D, N, STAGES, CAUSAL,
                WINDOW, TILED, False, X, Y,
            )  # fmt: skip
        if TILED:
            spot, real = _places(dq_ptr, b, h, begin, T, dq_batch, dq_head, dq_row, D, Y)
            acc = acc * scale
            if ADD:
                acc += gl.load(spot, mask=real, other=0.0)
            gl.store(spot, acc, mask=real)
        else:
            q.store((acc * scale).to(q_smem.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(dq, [b, h, begin, 0], q_smem.index(GROUP))
            tma.store_wait(0)
        mbarrier.arrive(q_empty.index(GROUP))
        turn += 1
        mbarrier.wait(q_full.index(GROUP), turn % 2)
        b, h, begin, masked, count, key, list_ = _read(notes)


@gluon.jit(
    do_not_specialize=["HEADS", "T", "S", "P", "PAIRS", "ROWS", "W", "window", "list_batch", "list_head", "TILES"]
)
def queries(
    q, k, v, do, dq, rows_ptr, next_ptr, list_ptr, span_ptr, order_ptr, dq_ptr, dq_batch, dq_head, dq_row, word_ptr,
    base_ptr, list_batch, list_head, HEADS, T, S, P, PAIRS, ROWS, W, window, factor, scale, TILES, G: gl.constexpr,
    D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    TILED: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Gradient of all queries; ``TILES`` tiles of 128 queries of all heads, ``next_ptr`` as in the forward pass."""
    q_smem = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, D], q.layout)
    do_smem = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, D], q.layout)
    ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, N, D], k.layout)
    notes = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend_queries, (
                0, dq, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, rows_ptr, list_ptr, span_ptr,
                dq_ptr, dq_batch, dq_head, dq_row, word_ptr, base_ptr, HEADS, T, S, P, PAIRS, W, window, factor, scale,
                D, BK, N, CAUSAL, WINDOW, TILED, ADD, STAGES,
            )),
            (_attend_queries, (
                1, dq, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, rows_ptr, list_ptr, span_ptr,
                dq_ptr, dq_batch, dq_head, dq_row, word_ptr, base_ptr, HEADS, T, S, P, PAIRS, W, window, factor, scale,
                D, BK, N, CAUSAL, WINDOW, TILED, ADD, STAGES,
            )),
            (_fetch_queries, (
                q, k, v, do, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, next_ptr, list_ptr, span_ptr,
                order_ptr, list_batch, list_head, HEADS, ROWS, W, TILES, G, D, BQ, BK, N, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
