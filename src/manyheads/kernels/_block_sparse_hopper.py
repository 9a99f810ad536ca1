# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Block-sparse attention for Hopper, where blocks are whole tiles of 128: what :mod:`._block_sparse` does, in Gluon.

A program stays on its multiprocessor and takes one tile of 128 queries after the other, the next that no program has
begun. One warp of it fetches (TMA): queries for each of two warpgroups, keys and values into a ring that both read. A
warpgroup has 64 of the queries; while the tensor cores multiply its weights of one tile of keys with the values, it
makes the weights of the next. Marks ``first, left, right, last`` of a list are those of :mod:`._block_sparse`; keys
that need a mask come before those that are seen whole. TILED and ADD are those of that module too: the output is then
float32 and stored from the registers.

What is fetched has two barriers, ``full`` and ``empty``. The ring is filled and read in the order K0, K1, V0, K2, V1,
... What the warp finds out of a tile it leaves in ``notes`` for the warpgroups, before the queries are there.
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

__all__ = ["forward"]

_LN2 = gl.constexpr(0.6931471805599453)
_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _bits(word_ptr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Whether bits are set ``[64, N]``: of rows of 4 words, from the first word at ``word_ptr`` on."""
    c = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))[None, :]
    at = word_ptr + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) * 4
    word = gl.load(at)[:, None]
    for i in gl.static_range(1, N // 32):
        word = gl.where(c // 32 == i, gl.load(at + i)[:, None], word)
    return ((word >> (c % 32)) & 1) != 0


@gluon.jit
def _places(ptr, b, h, begin, T, batch, head, row, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Where 64 rows of D numbers are, and which there are ``[64, D]``."""
    t = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    at = ptr + b.to(gl.int64) * batch + h.to(gl.int64) * head
    return at + t.to(gl.int64)[:, None] * row + c, (t < T)[:, None] & (c < D)


@gluon.jit
def _write(notes, a, b, c, d, e, f, g):
    """Leave seven numbers, before a barrier that this warp arrives at."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    i = gl.arange(0, 8, LAYOUT)
    x = gl.where(i == 0, a, gl.where(i == 1, b, gl.where(i == 2, c, d)))
    x = gl.where(i < 4, x, gl.where(i == 4, e, gl.where(i == 5, f, g)))
    notes.store(x)
    gl.thread_barrier()


@gluon.jit
def _read(notes):
    """The seven numbers; every thread of a warpgroup has all of them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    i = gl.arange(0, 8, LAYOUT)
    x = notes.load(LAYOUT)
    return (
        gl.sum(gl.where(i == 0, x, 0), 0), gl.sum(gl.where(i == 1, x, 0), 0), gl.sum(gl.where(i == 2, x, 0), 0),
        gl.sum(gl.where(i == 3, x, 0), 0), gl.sum(gl.where(i == 4, x, 0), 0), gl.sum(gl.where(i == 5, x, 0), 0),
        gl.sum(gl.where(i == 6, x, 0), 0),
    )  # fmt: skip


@gluon.jit
def _row(tile, order_ptr, list_batch, list_head, HEADS, ROWS, BQ: gl.constexpr):
    """Batch row, head, list and first query of a tile of 128 queries; longest lists of a head first."""
    parts: gl.constexpr = BQ // 128
    pair = tile // (ROWS * parts)
    place = tile % (ROWS * parts)
    b = pair // HEADS
    h = pair % HEADS
    lists = b * list_batch + h * list_head
    row = gl.load(order_ptr + lists + place // parts)
    return b, h, lists + row, row * BQ + place % parts * 128


@gluon.jit
def _marks(span_ptr, list_, BK: gl.constexpr, N: gl.constexpr):
    """First element of a list, first one of those seen whole, how many tiles are masked, how many there are."""
    at = span_ptr + list_ * 4
    first = gl.load(at)
    left = gl.load(at + 1)
    right = gl.load(at + 2)
    last = gl.load(at + 3)
    each: gl.constexpr = BK // N
    return first * BK, left * BK, (last - first - (right - left)) * each, (last - first) * each


@gluon.jit
def _key(j, list_ptr, first, left, masked, count, BK: gl.constexpr, N: gl.constexpr):
    """First key of the j-th tile of a list: those that need a mask, then those seen whole."""
    at = first + j * N
    at += gl.where(at >= left, (count - masked) * N, 0)
    at = gl.where(j >= masked, left + (j - masked) * N, at)
    return gl.load(list_ptr + at // BK) * BK + at % BK


@gluon.jit
def _fetch(
    q, k, v, q_smem, ring, notes, q_full, q_empty, full, empty, next_ptr, list_ptr, span_ptr, order_ptr, list_batch,
    list_head, HEADS, ROWS, W, TILES, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr,
    N: gl.constexpr, BUFFERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
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
        held = turn % BUFFERS
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(held * 2 + group), turn // BUFFERS % 2 ^ 1)
        _write(notes.index(held), b, h, begin, masked, count, key, list_)
        for group in gl.static_range(2):
            slot = held * 2 + group
            mbarrier.expect(q_full.index(slot), 64 * D * 2)
            tma.async_copy_global_to_shared(q, [b, h, begin + group * 64, 0], q_full.index(slot), q_smem.index(slot))
        before = key
        for j in range(count + 1):
            if j < count:
                if j > 0:
                    key = _key(j, list_at, first, left, masked, count, BK, N)
                slot = at % STAGES
                mbarrier.wait(empty.index(slot), at // STAGES % 2 ^ 1)
                mbarrier.expect(full.index(slot), N * D * 2)
                tma.async_copy_global_to_shared(k, [b, h // G, key, 0], full.index(slot), ring.index(slot))
                at += 1
            if j > 0:
                slot = at % STAGES
                mbarrier.wait(empty.index(slot), at // STAGES % 2 ^ 1)
                mbarrier.expect(full.index(slot), N * D * 2)
                tma.async_copy_global_to_shared(v, [b, h // G, before, 0], full.index(slot), ring.index(slot))
                at += 1
            before = key
        turn += 1
    held = turn % BUFFERS
    for group in gl.static_range(2):
        mbarrier.wait(q_empty.index(held * 2 + group), turn // BUFFERS % 2 ^ 1)
    _write(notes.index(held), 0, 0, 0, 0, -1, 0, 0)
    for group in gl.static_range(2):
        mbarrier.arrive(q_full.index(held * 2 + group))


@gluon.jit
def _weights(
    x, top, total, query, key, words, S, window, factor, N: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, TILED: gl.constexpr, MASK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights over the exponential of the new maximum, that maximum, the new sum, by how much the old one shrinks."""
    if MASK:
        if TILED:
            seen = _bits(words, N, LAYOUT)
        else:
            s = (key + gl.arange(0, N, gl.SliceLayout(0, LAYOUT)))[None, :]
            end = S + gl.zeros_like(query)
            if CAUSAL:
                end = gl.minimum(end, query + 1)
            elif WINDOW:
                end = gl.minimum(end, query + window)
            seen = s < end[:, None]
            if WINDOW:
                seen = seen & (s > (query - window)[:, None])
        x = gl.where(seen, x, float("-inf"))
    new = gl.maximum(top, gl.max(x, 1) * factor)
    base = new
    if MASK:
        base = gl.where(new == float("-inf"), 0.0, new)
    shrink = gl.exp2(top - base)
    p = gl.exp2(x * factor - base[:, None])
    return p, new, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(
    q, p, acc, top, total, more, at, ring, full, empty, query, key, words, S, window, factor, D: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TILED: gl.constexpr,
    MASK: gl.constexpr, X: gl.constexpr, Y: gl.constexpr,
):  # fmt: skip
    """Weights of a tile of keys while those of the one before are multiplied with its values.

    The keys, at place ``at`` of the ring, are there. If there are ``more`` they are waited for before the product with
    the values is: the assembler moves no weights across that place.
    """
    k_slot = at % STAGES
    k = ring.index(k_slot).reshape([N, D]).permute([1, 0])
    x = warpgroup_mma(q, k, gl.zeros([64, N], gl.float32, X), use_acc=False, is_async=True)
    v_slot = (at + 1) % STAGES
    mbarrier.wait(full.index(v_slot), (at + 1) // STAGES % 2)
    acc = warpgroup_mma(p, ring.index(v_slot).reshape([N, D]), acc, is_async=True)
    x = warpgroup_mma_wait(1, [x])
    mbarrier.arrive(empty.index(k_slot))
    y, top, total, shrink = _weights(
        x, top, total, query, key, words, S, window, factor, N, CAUSAL, WINDOW, TILED, MASK, X
    )
    mbarrier.wait(full.index((at + 2) % STAGES), (at + 2) // STAGES % 2, pred=more)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(empty.index(v_slot))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, Y))[:, None]
    return gl.convert_layout(y.to(p.dtype), p.type.layout), acc, top, total, at + 2


@gluon.jit
def _attend(
    GROUP: gl.constexpr, out, q_smem, ring, notes, q_full, q_empty, full, empty, lse_ptr, list_ptr, span_ptr,
    out_ptr, o_batch, o_head, o_row, word_ptr, base_ptr, HEADS, T, S, W, window, factor, D: gl.constexpr,
    BK: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TILED: gl.constexpr,
    ADD: gl.constexpr, MORE: gl.constexpr, BUFFERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each tile."""
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    Y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    at = 0
    turn = 0
    mbarrier.wait(q_full.index(GROUP), 0)
    b, h, begin, masked, count, key, list_ = _read(notes.index(0))
    while count >= 0:
        slot = turn % BUFFERS * 2 + GROUP
        words = word_ptr
        if TILED:
            base = gl.where(masked > 0, gl.load(base_ptr + begin // 128) + 1, 0)  # the first tile, if there is none
            words += base.to(gl.int64) * 512 + GROUP * 256
        begin += GROUP * 64
        t = begin + gl.arange(0, 64, gl.SliceLayout(1, X))
        query = t + (S - T)
        acc = gl.zeros([64, D], gl.float32, Y)
        top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, X))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, X))
        lse_at = lse_ptr + (b * HEADS + h).to(gl.int64) * T + t
        if ADD:
            top = gl.load(lse_at, mask=t < T, other=float("-inf")) * _LOG2E
            total = gl.where(top == float("-inf"), 0.0, 1.0)
            spot, real = _places(out_ptr, b, h, begin, T, o_batch, o_head, o_row, D, Y)
            acc = gl.load(spot, mask=real, other=0.0)
        if count > 0:
            q = q_smem.index(slot).reshape([64, D])
            mbarrier.wait(full.index(at % STAGES), at // STAGES % 2)
            k = ring.index(at % STAGES).reshape([N, D]).permute([1, 0])
            x = warpgroup_mma(q, k, gl.zeros([64, N], gl.float32, X), use_acc=False, is_async=True)
            x = warpgroup_mma_wait(0, [x])
            mbarrier.arrive(empty.index(at % STAGES))
            at += 1
            y, top, total, shrink = _weights(
                x, top, total, query, key, words, S, window, factor, N, CAUSAL, WINDOW, TILED, True, X
            )
            if ADD:
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, Y))[:, None]
            p = gl.convert_layout(y.to(ring.dtype), gl.DotOperandLayout(0, Y, 2))
            mbarrier.wait(full.index(at % STAGES), at // STAGES % 2, pred=count > 1)
            if MORE:
                first, left, _masked, _count = _marks(span_ptr, list_, BK, N)
                list_at = list_ptr + list_.to(gl.int64) * W
                for j in range(1, masked):
                    key = _key(j, list_at, first, left, masked, count, BK, N)
                    p, acc, top, total, at = _step(
                        q, p, acc, top, total, j + 1 < count, at, ring, full, empty, query, key, words + j * 512, S,
                        window, factor, D, N, STAGES, CAUSAL, WINDOW, TILED, True, X, Y,
                    )  # fmt: skip
            for j in range(gl.maximum(masked, 1) if MORE else 1, count):
                p, acc, top, total, at = _step(
                    q, p, acc, top, total, j + 1 < count, at, ring, full, empty, query, 0, words, S, window, factor, D,
                    N, STAGES, CAUSAL, WINDOW, TILED, False, X, Y,
                )  # fmt: skip
            mbarrier.wait(full.index(at % STAGES), at // STAGES % 2)
            acc = warpgroup_mma(p, ring.index(at % STAGES).reshape([N, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index(at % STAGES))
            at += 1
        lse = gl.where(total == 0.0, float("-inf"), top + gl.log2(total)) * _LN2
        gl.store(lse_at, lse, mask=t < T)
        whole = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, Y))
        if TILED:
            spot, real = _places(out_ptr, b, h, begin, T, o_batch, o_head, o_row, D, Y)
            gl.store(spot, acc * whole[:, None], mask=real)
        else:
            q_smem.index(slot).reshape([64, D]).store((acc * whole[:, None]).to(q_smem.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [b, h, begin, 0], q_smem.index(slot))
            tma.store_wait(0)
        mbarrier.arrive(q_empty.index(slot))
        turn += 1
        mbarrier.wait(q_full.index(turn % BUFFERS * 2 + GROUP), turn // BUFFERS % 2)
        b, h, begin, masked, count, key, list_ = _read(notes.index(turn % BUFFERS))


@gluon.jit(do_not_specialize=["HEADS", "T", "S", "ROWS", "W", "window", "list_batch", "list_head", "TILES"])
def forward(
    q, k, v, out, lse_ptr, next_ptr, list_ptr, span_ptr, order_ptr, out_ptr, o_batch, o_head, o_row, word_ptr, base_ptr,
    list_batch, list_head, HEADS, T, S, ROWS, W, window, factor, TILES, G: gl.constexpr, D: gl.constexpr,
    BQ: gl.constexpr, BK: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    TILED: gl.constexpr, ADD: gl.constexpr, MORE: gl.constexpr, BUFFERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Output of all queries and their log-sum-exp ``[B, H, T]``.

    ``TILES`` tiles of 128 queries of all heads; ``next_ptr`` counts from 0 those that were begun after the first of
    each program. MORE: lists may have more than one tile that needs a mask. The first tile of ``word_ptr`` is whole.
    """
    q_smem = gl.allocate_shared_memory(q.dtype, [BUFFERS * 2, 1, 1, 64, D], q.layout)
    ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, N, D], k.layout)
    notes = gl.allocate_shared_memory(gl.int32, [BUFFERS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS * 2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS * 2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS * 2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                0, out, q_smem, ring, notes, q_full, q_empty, full, empty, lse_ptr, list_ptr, span_ptr, out_ptr,
                o_batch, o_head, o_row, word_ptr, base_ptr, HEADS, T, S, W, window, factor, D, BK, N, CAUSAL, WINDOW,
                TILED, ADD, MORE, BUFFERS, STAGES,
            )),
            (_attend, (
                1, out, q_smem, ring, notes, q_full, q_empty, full, empty, lse_ptr, list_ptr, span_ptr, out_ptr,
                o_batch, o_head, o_row, word_ptr, base_ptr, HEADS, T, S, W, window, factor, D, BK, N, CAUSAL, WINDOW,
                TILED, ADD, MORE, BUFFERS, STAGES,
            )),
            (_fetch, (
                q, k, v, q_smem, ring, notes, q_full, q_empty, full, empty, next_ptr, list_ptr, span_ptr, order_ptr,
                list_batch, list_head, HEADS, ROWS, W, TILES, G, D, BQ, BK, N, BUFFERS, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
