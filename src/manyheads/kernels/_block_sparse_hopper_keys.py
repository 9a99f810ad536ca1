# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Gradients of the keys and values of block-sparse attention for Hopper; :mod:`._block_sparse_hopper` says how the
programs are made up: here a warpgroup has 64 keys, and what is fetched are queries, with the gradients of their output
and their ``rows`` (:mod:`._block_sparse_hopper_queries`). Tiles have keys before queries, so that no product is
transposed after it was made.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._block_sparse_hopper import _bits, _key, _marks, _places, _read, _write
from ._block_sparse_hopper_queries import _unseen

__all__ = ["keys"]


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
    WHOLE: gl.constexpr, q, do, rows_, q_ring, do_ring, row_ring, t_ring, full, empty, list_ptr, span_ptr, base, lists,
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
                _write(t_ring.index(slot), t, base + j * M // BQ, 0, 0, 0, 0, 0)
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
    next_ptr, list_ptr, span_ptr, order_ptr, base_ptr, list_batch, list_head, order_batch, order_head, KV_HEADS, PAIRS,
    ROWS, W, TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, TILE: gl.constexpr, M: gl.constexpr,
    TILED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: keys and values of a tile, then queries, their gradients and rows."""
    at = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < TILES:
        b, h, row, begin = _keys_tile(tile, order_ptr, order_batch, order_head, KV_HEADS, ROWS, TILE)
        tile = gl.num_programs(0) + gl.atomic_add(next_ptr, 1, sem="relaxed")
        lists = b * list_batch + h * G * list_head + row
        base = 0
        if TILED:
            base = gl.load(base_ptr + row)
        masked = 0
        count = 0
        for g in range(G):
            _first, _left, some, all_ = _marks(span_ptr, lists + g * list_head, BQ, M)
            masked += some
            count += all_
        for group in gl.static_range(2):
            mbarrier.wait(k_empty.index(group), turn % 2 ^ 1)
        _write(notes.index(0), b, h, begin, masked, count, 0, 0)
        for group in gl.static_range(2):
            mbarrier.expect(k_full.index(group), 2 * 64 * D * 2)
            place = [b, h, begin + group * 64, 0]
            tma.async_copy_global_to_shared(k, place, k_full.index(group), k_smem.index(group))
            tma.async_copy_global_to_shared(v, place, k_full.index(group), v_smem.index(group))
        at = _fetch_queries_of(
            False, q, do, rows_, q_ring, do_ring, row_ring, t_ring, full, empty, list_ptr, span_ptr, base, lists,
            list_head, b, h, KV_HEADS * G, PAIRS, W, at, G, D, BQ, M, STAGES,
        )  # fmt: skip
        at = _fetch_queries_of(
            True, q, do, rows_, q_ring, do_ring, row_ring, t_ring, full, empty, list_ptr, span_ptr, base, lists,
            list_head, b, h, KV_HEADS * G, PAIRS, W, at, G, D, BQ, M, STAGES,
        )  # fmt: skip
        turn += 1
    for group in gl.static_range(2):
        mbarrier.wait(k_empty.index(group), turn % 2 ^ 1)
    _write(notes.index(0), 0, 0, 0, 0, -1, 0, 0)
    for group in gl.static_range(2):
        mbarrier.arrive(k_full.index(group))


@gluon.jit
def _keys_step(
    k, v, dk, dv, at, q_ring, do_ring, row_ring, t_ring, full, empty, s, words, S, shift, window, factor,
    D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    TILED: gl.constexpr, MASK: gl.constexpr, X: gl.constexpr, Y: gl.constexpr,
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
        t, number, _2, _3, _4, _5, _6 = _read(t_ring.index(slot))
        if TILED:
            p = gl.where(_bits(words + number.to(gl.int64) * 512 + t % 128 // 32, M, X), p, 0.0)
        else:
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
    empty, dk_ptr, dk_batch, dk_head, dk_row, dv_ptr, dv_batch, dv_head, dv_row, word_ptr, T, S, window, factor, scale,
    D: gl.constexpr, M: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TILED: gl.constexpr,
    STAGES: gl.constexpr,
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
        k = k_smem.index(GROUP).reshape([64, D])
        v = v_smem.index(GROUP).reshape([64, D])
        for _j in range(masked):
            dk, dv, at = _keys_step(
                k, v, dk, dv, at, q_ring, do_ring, row_ring, t_ring, full, empty, s, word_ptr + GROUP * 256, S, S - T,
                window, factor, D, M, STAGES, CAUSAL, WINDOW, TILED, True, X, Y,
            )  # fmt: skip
        for _j in range(masked, count):
            dk, dv, at = _keys_step(
                k, v, dk, dv, at, q_ring, do_ring, row_ring, t_ring, full, empty, s, word_ptr + GROUP * 256, S, S - T,
                window, factor, D, M, STAGES, CAUSAL, WINDOW, TILED, False, X, Y,
            )  # fmt: skip
        if TILED:
            spot, real = _places(dk_ptr, b, h, begin, S, dk_batch, dk_head, dk_row, D, Y)
            gl.store(spot, dk * scale, mask=real)
            spot, real = _places(dv_ptr, b, h, begin, S, dv_batch, dv_head, dv_row, D, Y)
            gl.store(spot, dv, mask=real)
        else:
            k.store((dk * scale).to(k_smem.dtype))
            v.store(dv.to(v_smem.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(dk_, [b, h, begin, 0], k_smem.index(GROUP))
            tma.async_copy_shared_to_global(dv_, [b, h, begin, 0], v_smem.index(GROUP))
            tma.store_wait(0)
        mbarrier.arrive(k_empty.index(GROUP))
        turn += 1
        mbarrier.wait(k_full.index(GROUP), turn % 2)
        b, h, begin, masked, count, _5, _6 = _read(notes.index(0))


@gluon.jit(
    do_not_specialize=[
        "KV_HEADS", "T", "S", "PAIRS", "ROWS", "W", "window", "list_batch", "list_head", "order_batch", "order_head",
        "TILES",
    ]
)  # fmt: skip
def keys(
    q, k, v, do, rows_, dk, dv, next_ptr, list_ptr, span_ptr, order_ptr, dk_ptr, dk_batch, dk_head, dk_row, dv_ptr,
    dv_batch, dv_head, dv_row, word_ptr, base_ptr, list_batch, list_head, order_batch, order_head, KV_HEADS, T, S,
    PAIRS, ROWS, W, window, factor, scale, TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr,
    TILE: gl.constexpr, M: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TILED: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of all keys and values; ``TILES`` tiles of 128 keys of all key heads."""
    k_smem = gl.allocate_shared_memory(k.dtype, [2, 1, 1, 64, D], k.layout)
    v_smem = gl.allocate_shared_memory(k.dtype, [2, 1, 1, 64, D], k.layout)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, D], q.layout)
    do_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, D], q.layout)
    row_ring = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1, M], rows_.layout)
    t_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = gl.allocate_shared_memory(gl.int32, [1, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend_keys, (
                0, dk, dv, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full, empty,
                dk_ptr, dk_batch, dk_head, dk_row, dv_ptr, dv_batch, dv_head, dv_row, word_ptr, T, S, window, factor,
                scale, D, M, CAUSAL, WINDOW, TILED, STAGES,
            )),
            (_attend_keys, (
                1, dk, dv, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full, empty,
                dk_ptr, dk_batch, dk_head, dk_row, dv_ptr, dv_batch, dv_head, dv_row, word_ptr, T, S, window, factor,
                scale, D, M, CAUSAL, WINDOW, TILED, STAGES,
            )),
            (_fetch_keys, (
                q, k, v, do, rows_, k_smem, v_smem, q_ring, do_ring, row_ring, t_ring, notes, k_full, k_empty, full,
                empty, next_ptr, list_ptr, span_ptr, order_ptr, base_ptr, list_batch, list_head, order_batch,
                order_head, KV_HEADS, PAIRS, ROWS, W, TILES, G, D, BQ, TILE, M, TILED, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
