# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Gradients of block-sparse attention for Hopper; :mod:`._block_sparse_hopper` says how the programs are made up.

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

from ._block_sparse_hopper import _key, _marks, _read, _row, _write

__all__ = ["keys", "queries", "rows"]


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


# ---- queries


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
    q, do, acc, lse, delta, at, ring, full, empty, query, key, S, window, factor, D: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASK: gl.constexpr, X: gl.constexpr,
    Y: gl.constexpr,
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
    HEADS, T, S, P, PAIRS, W, window, factor, scale, D: gl.constexpr, BK: gl.constexpr, N: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
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
                q, do, acc, lse, delta, at, ring, full, empty, query, key, S, window, factor, D, N, STAGES, CAUSAL,
                WINDOW, True, X, Y,
            )  # fmt: skip
        for _j in range(masked, count):
            acc, at = _queries_step(
                q, do, acc, lse, delta, at, ring, full, empty, query, 0, S, window, factor, D, N, STAGES, CAUSAL,
                WINDOW, False, X, Y,
            )  # fmt: skip
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
    q, k, v, do, dq, rows_ptr, next_ptr, list_ptr, span_ptr, order_ptr, list_batch, list_head, HEADS, T, S, P, PAIRS,
    ROWS, W, window, factor, scale, TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr,
    N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
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
                HEADS, T, S, P, PAIRS, W, window, factor, scale, D, BK, N, CAUSAL, WINDOW, STAGES,
            )),
            (_attend_queries, (
                1, dq, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, rows_ptr, list_ptr, span_ptr,
                HEADS, T, S, P, PAIRS, W, window, factor, scale, D, BK, N, CAUSAL, WINDOW, STAGES,
            )),
            (_fetch_queries, (
                q, k, v, do, q_smem, do_smem, ring, notes, q_full, q_empty, full, empty, next_ptr, list_ptr, span_ptr,
                order_ptr, list_batch, list_head, HEADS, ROWS, W, TILES, G, D, BQ, BK, N, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


# ---- keys


@gluon.jit
def _keys_tile(tile, order_ptr, order_batch, order_head, KV_HEADS, ROWS, TILE: gl.constexpr):
    """Batch row, key head, list and first key of a tile of 128 keys; longest lists of a head first."""
    parts: gl.constexpr = TILE // 128
    pair = tile // (ROWS * parts)
    place = tile % (ROWS * parts)
    b = pair // KV_HEADS
    h = pair % KV_HEADS
    row = gl.load(order_ptr + b * order_batch + h * order_head + place // parts)
    return b, h, row, row * TILE + place % parts * 128


@gluon.jit
def _fetch_queries_of(
    WHOLE: gl.constexpr, q, do, rows_, q_ring, do_ring, row_ring, t_ring, full, empty, list_ptr, span_ptr, lists,
    list_head, b, h, HEADS, PAIRS, W, at, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the queries that see all, or only some keys of a tile, over the heads of a group."""
    for g in range(G):
        head = h * G + g
        list_ = lists + g * list_head
        pair = b * HEADS + head
        first, left, masked, count = _marks(span_ptr, list_, BQ, M)
        list_at = list_ptr + list_.to(gl.int64) * W
        for j in range(masked if WHOLE else 0, count if WHOLE else masked):
            t = _key(j, list_at, first, left, masked, count, BQ, M)
            slot = at % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), at // STAGES % 2 ^ 1)
            if not WHOLE:
                _write(t_ring.index(slot), t, 0, 0, 0, 0, 0, 0)
            mbarrier.expect(bar, 2 * M * D * 2 + 2 * M * 4)
            tma.async_copy_global_to_shared(q, [b, head, t, 0], bar, q_ring.index(slot))
            tma.async_copy_global_to_shared(rows_, [pair, t], bar, row_ring.index(slot * 2))
            tma.async_copy_global_to_shared(do, [b, head, t, 0], bar, do_ring.index(slot))
            tma.async_copy_global_to_shared(rows_, [PAIRS + pair, t], bar, row_ring.index(slot * 2 + 1))
            at += 1
    return at


@gluon.jit
def _fetch_keys(
    q, k, v, do, rows_, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full, empty,
    next_ptr, list_ptr, span_ptr, order_ptr, list_batch, list_head, order_batch, order_head, KV_HEADS, PAIRS, ROWS, W,
    TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, TILE: gl.constexpr, M: gl.constexpr,
    BUFFERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: keys and values of a tile, then queries, their gradients and rows."""
    at = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < TILES:
        b, h, row, begin = _keys_tile(tile, order_ptr, order_batch, order_head, KV_HEADS, ROWS, TILE)
        tile = gl.num_programs(0) + gl.atomic_add(next_ptr, 1, sem="relaxed")
        lists = b * list_batch + h * G * list_head + row
        masked = 0
        count = 0
        for g in range(G):
            _first, _left, some, all_ = _marks(span_ptr, lists + g * list_head, BQ, M)
            masked += some
            count += all_
        held = turn % BUFFERS
        for group in gl.static_range(2):
            mbarrier.wait(k_empty.index(held * 2 + group), turn // BUFFERS % 2 ^ 1)
        _write(notes.index(held), b, h, begin, masked, count, 0, 0)
        for group in gl.static_range(2):
            slot = held * 2 + group
            mbarrier.expect(k_full.index(slot), 2 * 64 * D * 2)
            place = [b, h, begin + group * 64, 0]
            tma.async_copy_global_to_shared(k, place, k_full.index(slot), k_smem.index(slot))
            tma.async_copy_global_to_shared(v, place, k_full.index(slot), v_smem.index(slot))
        at = _fetch_queries_of(
            False, q, do, rows_, q_ring, do_ring, row_ring, t_ring, full, empty, list_ptr, span_ptr, lists, list_head,
            b, h, KV_HEADS * G, PAIRS, W, at, G, D, BQ, M, STAGES,
        )  # fmt: skip
        at = _fetch_queries_of(
            True, q, do, rows_, q_ring, do_ring, row_ring, t_ring, full, empty, list_ptr, span_ptr, lists, list_head,
            b, h, KV_HEADS * G, PAIRS, W, at, G, D, BQ, M, STAGES,
        )  # fmt: skip
        turn += 1
    held = turn % BUFFERS
    for group in gl.static_range(2):
        mbarrier.wait(k_empty.index(held * 2 + group), turn // BUFFERS % 2 ^ 1)
    _write(notes.index(held), 0, 0, 0, 0, -1, 0, 0)
    for group in gl.static_range(2):
        mbarrier.arrive(k_full.index(held * 2 + group))


@gluon.jit
def _keys_step(
    k, v, dk, dv, at, q_ring, do_ring, row_ring, t_ring, full, empty, s, S, shift, window, factor, D: gl.constexpr,
    M: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASK: gl.constexpr,
    X: gl.constexpr, Y: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 keys and values from M queries; all tiles have keys before queries."""
    A: gl.constexpr = gl.DotOperandLayout(0, Y, 2)
    columns: gl.constexpr = gl.SliceLayout(0, X)
    slot = at % STAGES
    mbarrier.wait(full.index(slot), at // STAGES % 2)
    q = q_ring.index(slot).reshape([M, D])
    do = do_ring.index(slot).reshape([M, D])
    x = warpgroup_mma(k, q.permute([1, 0]), gl.zeros([64, M], gl.float32, X), use_acc=False, is_async=True)
    y = warpgroup_mma(v, do.permute([1, 0]), gl.zeros([64, M], gl.float32, X), use_acc=False, is_async=True)
    lse = row_ring.index(slot * 2).reshape([M]).load(columns)
    x = warpgroup_mma_wait(1, [x])
    p = gl.exp2(x * factor - lse[None, :])
    if MASK:
        t, _1, _2, _3, _4, _5, _6 = _read(t_ring.index(slot))
        query = t + shift + gl.arange(0, M, columns)
        p = _unseen(p, query[None, :], s[:, None], S, window, CAUSAL, WINDOW)
    dv = warpgroup_mma(gl.convert_layout(p.to(q.dtype), A), do, dv, is_async=True)
    delta = row_ring.index(slot * 2 + 1).reshape([M]).load(columns)
    y = warpgroup_mma_wait(1, [y])
    ds = gl.convert_layout((p * (y - delta[None, :])).to(q.dtype), A)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dv, dk = warpgroup_mma_wait(0, [dv, dk])
    mbarrier.arrive(empty.index(slot))
    return dk, dv, at + 1


@gluon.jit
def _attend_keys(
    GROUP: gl.constexpr, dk_, dv_, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full,
    empty, T, S, window, factor, scale, D: gl.constexpr, M: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    BUFFERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 keys of each tile."""
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    Y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    at = 0
    turn = 0
    mbarrier.wait(k_full.index(GROUP), 0)
    b, h, begin, masked, count, _5, _6 = _read(notes.index(0))
    while count >= 0:
        begin += GROUP * 64
        s = begin + gl.arange(0, 64, gl.SliceLayout(1, X))
        dk = gl.zeros([64, D], gl.float32, Y)
        dv = gl.zeros([64, D], gl.float32, Y)
        slot = turn % BUFFERS * 2 + GROUP
        k = k_smem.index(slot).reshape([64, D])
        v = v_smem.index(slot).reshape([64, D])
        for _j in range(masked):
            dk, dv, at = _keys_step(
                k, v, dk, dv, at, q_ring, do_ring, row_ring, t_ring, full, empty, s, S, S - T, window, factor, D, M,
                STAGES, CAUSAL, WINDOW, True, X, Y,
            )  # fmt: skip
        for _j in range(masked, count):
            dk, dv, at = _keys_step(
                k, v, dk, dv, at, q_ring, do_ring, row_ring, t_ring, full, empty, s, S, S - T, window, factor, D, M,
                STAGES, CAUSAL, WINDOW, False, X, Y,
            )  # fmt: skip
        k.store((dk * scale).to(k_smem.dtype))
        v.store(dv.to(v_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_, [b, h, begin, 0], k_smem.index(slot))
        tma.async_copy_shared_to_global(dv_, [b, h, begin, 0], v_smem.index(slot))
        tma.store_wait(0)
        mbarrier.arrive(k_empty.index(slot))
        turn += 1
        mbarrier.wait(k_full.index(turn % BUFFERS * 2 + GROUP), turn // BUFFERS % 2)
        b, h, begin, masked, count, _5, _6 = _read(notes.index(turn % BUFFERS))


@gluon.jit(
    do_not_specialize=[
        "KV_HEADS", "T", "S", "PAIRS", "ROWS", "W", "window", "list_batch", "list_head", "order_batch", "order_head",
        "TILES",
    ]
)  # fmt: skip
def keys(
    q, k, v, do, rows_, dk, dv, next_ptr, list_ptr, span_ptr, order_ptr, list_batch, list_head, order_batch, order_head,
    KV_HEADS, T, S, PAIRS, ROWS, W, window, factor, scale, TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr,
    TILE: gl.constexpr, M: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BUFFERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of all keys and values; ``TILES`` tiles of 128 keys of all key heads."""
    k_smem = gl.allocate_shared_memory(k.dtype, [BUFFERS * 2, 1, 1, 64, D], k.layout)
    v_smem = gl.allocate_shared_memory(k.dtype, [BUFFERS * 2, 1, 1, 64, D], k.layout)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, D], q.layout)
    do_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, D], q.layout)
    row_ring = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1, M], rows_.layout)
    t_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = gl.allocate_shared_memory(gl.int32, [BUFFERS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS * 2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS * 2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS * 2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend_keys, (
                0, dk, dv, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full, empty, T, S,
                window, factor, scale, D, M, CAUSAL, WINDOW, BUFFERS, STAGES,
            )),
            (_attend_keys, (
                1, dk, dv, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full, empty, T, S,
                window, factor, scale, D, M, CAUSAL, WINDOW, BUFFERS, STAGES,
            )),
            (_fetch_keys, (
                q, k, v, do, rows_, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full,
                empty, next_ptr, list_ptr, span_ptr, order_ptr, list_batch, list_head, order_batch, order_head,
                KV_HEADS, PAIRS, ROWS, W, TILES, G, D, BQ, TILE, M, BUFFERS, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
