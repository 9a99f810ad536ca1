# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The Triton kernels of :mod:`manyheads.kernels.block_sparse`, where their method stands.

A list of blocks is read as one run of numbers: element n of it is element ``n % BLOCK`` of block ``list[n // BLOCK]``.
Tiles are cut from that run, so they lie within a block where blocks are large and are gathered from several where they
are small. Of four marks ``first, left, right, last`` (in blocks) everything from left to right is seen whole and needs
no mask.

Constants of a launch: D and DV channels of keys and values, WD and WV columns that hold them; BQ and BK queries and
keys of a block; M queries and N keys of a tile; G query heads share a key head; CAUSAL, WINDOW: the rule; BIAS: logits
of keys have a bias; DOCS: a query sees the keys of its own document; TILED: blocks that are not seen whole have bits
(:class:`manyheads.attention.tile_pattern.TilePattern`) and stand behind the others; ADD: what is there is added to;
GIVEN: delta is known; ASM: NVIDIA's assembly runs, as it does not in an interpreter.
"""

import triton
import triton.language as tl

__all__ = ["backward_queries", "forward"]

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _marks(ptr, BLOCK: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """First element, first one of those seen whole, how many these are (of whole tiles), end."""
    first = tl.load(ptr) * BLOCK
    left = tl.load(ptr + 1) * BLOCK
    whole = (tl.load(ptr + 2) * BLOCK - left) // N * N
    if MASKED:
        whole = whole * 0
    return first, left, whole, tl.load(ptr + 3) * BLOCK


@triton.jit
def _entry(list_ptr, at, stop, BLOCK: tl.constexpr, ASM: tl.constexpr):
    """The block of elements ``at`` of a list that ends at ``stop``; the nearest one for others.

    A plain load would become part of the loop's pipeline, take one of its stages, and have each step wait for all keys
    that are on their way. Hidden from the pipeline it runs ahead for steps that do not come: hence the bounds.
    """
    at = tl.maximum(tl.minimum(at, stop - 1) // BLOCK, 0)
    if ASM:
        block = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [(list_ptr + at).to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        block = tl.load(list_ptr + at)
    return block


@triton.jit
def _places(
    list_ptr, start, left, whole, stop, BLOCK: tl.constexpr, N: tl.constexpr, ASM: tl.constexpr, MASK: tl.constexpr
):
    """Numbers of the N elements from ``start`` on, the place of the first, places of all, and which there are.

    In a masked tile what is seen whole, ``whole`` elements from ``left`` on, is left out of the count.
    """
    n = start + tl.arange(0, N)
    if MASK:
        n += tl.where(n >= left, whole, 0)
    if BLOCK % N == 0:
        if MASK:
            start += tl.where(start >= left, whole, 0)
        start = _entry(list_ptr, start, stop, BLOCK, ASM) * BLOCK + start % BLOCK
        at = start + tl.arange(0, N)
    else:
        at = _entry(list_ptr, n, stop, BLOCK, ASM) * BLOCK + n % BLOCK
    return n, start, at, n < stop


@triton.jit
def _tile(
    ptr, first, at, row, held, D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, ADJACENT: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Rows ``at`` ``[N, WIDTH]``, which follow ``first`` if they are adjacent; zeros in columns past D and, in a masked
    tile, in rows that are not held.
    """
    c = tl.arange(0, WIDTH)[None, :]
    if ADJACENT:
        spot = ptr + tl.cast(first, tl.int64) * row + (tl.arange(0, N)[:, None] * row + c)
    else:
        spot = ptr + at.to(tl.int64)[:, None] * row + c
    if MASK:
        if D == WIDTH:
            x = tl.load(spot, mask=held[:, None], other=0.0)
        else:
            x = tl.load(spot, mask=held[:, None] & (c < D), other=0.0)
    elif D == WIDTH:
        x = tl.load(spot)
    else:
        x = tl.load(spot, mask=c < D, other=0.0)
    return x


@triton.jit
def _allowed(apart, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the rule lets a query see a key so many columns before it."""
    seen = apart >= 0
    if not CAUSAL:
        seen = apart == apart
    if WINDOW:
        seen = seen & (apart < window)
        if not CAUSAL:
            seen = seen & (apart > -window)
    return seen


@triton.jit
def _bits(word_ptr, row, column, N: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the bits of a tile are set ``[rows, N]``: of these rows, N columns from ``column`` on."""
    c = tl.arange(0, N)[None, :]
    at = word_ptr + row * (BLOCK // 32) + column // 32
    word = tl.load(at)[:, None]
    for i in tl.static_range(1, N // 32):
        word = tl.where(c // 32 == i, tl.load(at + i)[:, None], word)
    return ((word >> (c % 32)) & 1) != 0


@triton.jit
def _row(
    list_ptr, span_ptr, order_ptr, list_batch, list_head, batch, head, T, ROWS, W, BQ: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The M queries of a program, which of them there are, marks and list of their block; longest lists first."""
    parts: tl.constexpr = (BQ + M - 1) // M
    lists = batch * list_batch + head * list_head
    row = tl.load(order_ptr + lists + tl.program_id(0) // parts)
    begin = row * BQ + tl.program_id(0) % parts * M
    t = begin + tl.arange(0, M)
    real = t < tl.minimum(T, (row + 1) * BQ)
    return begin, t, real, span_ptr + (lists + row) * 4, list_ptr + (lists + row) * W


@triton.jit
def _logits(
    x, t, s, held, bias_ptr, mine, theirs_ptr, word_ptr, start, shift, window, factor, BQ: tl.constexpr,
    BK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, DOCS: tl.constexpr,
    TILED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Logits ``[M, N]`` over ln 2; -inf where nothing is seen. ``start`` counts the elements of blocks with bits."""
    x = x * factor
    if MASK:
        seen = _allowed((t + shift)[:, None] - s[None, :], window, CAUSAL, WINDOW) & held[None, :]
        if BIAS:
            x += (tl.load(bias_ptr + s, mask=held, other=0.0).to(tl.float32) * _LOG2E)[None, :]
        if DOCS:
            seen = seen & (mine[:, None] == tl.load(theirs_ptr + s, mask=held, other=0)[None, :])
        if TILED:
            at = word_ptr + tl.cast(start // BK, tl.int64) * (BQ * BK // 32)
            seen = seen & _bits(at, t % BQ, start % BK, x.shape[1], BK)
        x = tl.where(seen, x, float("-inf"))
    return x


@triton.jit
def _forward_step(
    q, t, mine, acc, top, total, k_ptr, v_ptr, list_ptr, bias_ptr, theirs_ptr, word_ptr, start, left, whole, stop,
    k_row, v_row, S, shift, window, factor, D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, TILED: tl.constexpr, ASM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    _n, at, s, held = _places(list_ptr, start, left, whole, stop, BK, N, ASM, MASK)
    held = held & (s < S)
    k = _tile(k_ptr, at, s, k_row, held, D, WD, N, BK % N == 0, MASK)
    x = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    x = _logits(
        x, t, s, held, bias_ptr, mine, theirs_ptr, word_ptr, start, shift, window, factor, BQ, BK, CAUSAL, WINDOW, BIAS,
        DOCS, TILED, MASK,
    )  # fmt: skip
    new = tl.maximum(top, tl.max(x, 1))
    base = new
    if MASK:
        base = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(top - base)
    p = tl.exp2(x - base[:, None])
    total = total * shrink + tl.sum(p, 1)
    v = _tile(v_ptr, at, s, v_row, held, DV, WV, N, BK % N == 0, MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, new, total


@triton.jit(do_not_specialize=["T", "S", "ROWS", "W", "window", "list_batch", "list_head"])
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, list_ptr, span_ptr, order_ptr, word_ptr, base_ptr, bias_ptr, mine_ptr,
    theirs_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    list_batch, list_head, bias_batch, bias_head, mine_batch, theirs_batch, HEADS, T, S, ROWS, W, window, factor,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WV: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, TILED: tl.constexpr, ADD: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of a block of queries, query head): output of M queries and their log-sum-exp ``[B, H, T]``."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    begin, t, real, span_ptr, list_ptr = _row(
        list_ptr, span_ptr, order_ptr, list_batch, list_head, b, h, T, ROWS, W, BQ, M
    )
    k_ptr += b * k_batch + h // G * k_head
    v_ptr += b * v_batch + h // G * v_head
    bias_ptr += b * bias_batch + h * bias_head
    theirs_ptr += b * theirs_batch
    q = _tile(q_ptr + b * q_batch + h * q_head, begin, t, q_row, real, D, WD, M, True, True)
    mine = t
    if DOCS:
        mine = tl.load(mine_ptr + b * mine_batch + t, mask=real, other=-2)
    first, left, whole, stop = _marks(span_ptr, BK, N, BIAS or DOCS)
    acc = tl.zeros([M, WV], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    c = tl.arange(0, WV)[None, :]
    spot = out_ptr + b * o_batch + h * o_head + t.to(tl.int64)[:, None] * o_row + c
    if TILED:
        word_ptr += tl.load(base_ptr + begin // BQ).to(tl.int64) * (BQ * BK // 32)
    if ADD:  # what was found of other keys counts as one key with that output and logit
        top = tl.load(lse_ptr + pair * T + t, mask=real, other=float("-inf")) * _LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.load(spot, mask=real[:, None] & (c < DV), other=0.0).to(tl.float32)
    if not (BIAS or DOCS):
        for n in tl.range(left, left + whole, N, num_stages=STAGES):
            acc, top, total = _forward_step(
                q, t, mine, acc, top, total, k_ptr, v_ptr, list_ptr, bias_ptr, theirs_ptr, word_ptr, n, left, whole,
                stop, k_row, v_row, S, S - T, window, factor, D, DV, WD, WV, BQ, BK, N, CAUSAL, WINDOW, BIAS, DOCS,
                TILED, ASM, False,
            )  # fmt: skip
    for n in tl.range(first, stop - whole, N, num_stages=STAGES):
        acc, top, total = _forward_step(
            q, t, mine, acc, top, total, k_ptr, v_ptr, list_ptr, bias_ptr, theirs_ptr, word_ptr, n, left, whole, stop,
            k_row, v_row, S, S - T, window, factor, D, DV, WD, WV, BQ, BK, N, CAUSAL, WINDOW, BIAS, DOCS, TILED, ASM,
            True,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total)) * _LN2
    tl.store(lse_ptr + pair * T + t, lse, mask=real)
    tl.store(spot, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (c < DV))


@triton.jit
def _queries_step(
    q, do, t, mine, lse, delta, acc, k_ptr, v_ptr, list_ptr, bias_ptr, theirs_ptr, word_ptr, start, left, whole, stop,
    k_row, v_row, S, shift, window, factor, D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
    DOCS: tl.constexpr, TILED: tl.constexpr, ASM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    _n, at, s, held = _places(list_ptr, start, left, whole, stop, BK, N, ASM, MASK)
    held = held & (s < S)
    k = _tile(k_ptr, at, s, k_row, held, D, WD, N, BK % N == 0, MASK)
    v = _tile(v_ptr, at, s, v_row, held, DV, WV, N, BK % N == 0, MASK)
    x = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    x = _logits(
        x, t, s, held, bias_ptr, mine, theirs_ptr, word_ptr, start, shift, window, factor, BQ, BK, CAUSAL, WINDOW, BIAS,
        DOCS, TILED, MASK,
    )  # fmt: skip
    p = tl.exp2(x - lse[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision="tf32x3") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="tf32x3")


@triton.jit(do_not_specialize=["T", "S", "ROWS", "W", "window", "list_batch", "list_head"])
def backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, list_ptr, span_ptr, order_ptr, word_ptr,
    base_ptr, bias_ptr, mine_ptr, theirs_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, do_batch, do_head, do_row, dq_batch, dq_head, dq_row, list_batch, list_head, bias_batch,
    bias_head, mine_batch, theirs_batch, HEADS, T, S, ROWS, W, window, factor, scale, G: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, WD: tl.constexpr, WV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, DOCS: tl.constexpr,
    TILED: tl.constexpr, ADD: tl.constexpr, GIVEN: tl.constexpr, DLSE: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of a block of queries, query head): gradient of M queries; leaves ``do . out - dlse`` in delta."""
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    begin, t, real, span_ptr, list_ptr = _row(
        list_ptr, span_ptr, order_ptr, list_batch, list_head, b, h, T, ROWS, W, BQ, M
    )
    k_ptr += b * k_batch + h // G * k_head
    v_ptr += b * v_batch + h // G * v_head
    bias_ptr += b * bias_batch + h * bias_head
    theirs_ptr += b * theirs_batch
    do = _tile(do_ptr + b * do_batch + h * do_head, begin, t, do_row, real, DV, WV, M, True, True)
    if GIVEN:
        delta = tl.load(delta_ptr + pair * T + t, mask=real, other=0.0)
    else:
        o = _tile(out_ptr + b * o_batch + h * o_head, begin, t, o_row, real, DV, WV, M, True, True)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if DLSE:
            delta -= tl.load(dlse_ptr + pair * T + t, mask=real, other=0.0)
        tl.store(delta_ptr + pair * T + t, delta, mask=real)
    lse = tl.load(lse_ptr + pair * T + t, mask=real, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * _LOG2E
    q = _tile(q_ptr + b * q_batch + h * q_head, begin, t, q_row, real, D, WD, M, True, True)
    mine = t
    if DOCS:
        mine = tl.load(mine_ptr + b * mine_batch + t, mask=real, other=-2)
    first, left, whole, stop = _marks(span_ptr, BK, N, BIAS or DOCS)
    acc = tl.zeros([M, WD], tl.float32)
    if TILED:
        word_ptr += tl.load(base_ptr + begin // BQ).to(tl.int64) * (BQ * BK // 32)
    if not (BIAS or DOCS):
        for n in tl.range(left, left + whole, N, num_stages=STAGES):
            acc = _queries_step(
                q, do, t, mine, lse, delta, acc, k_ptr, v_ptr, list_ptr, bias_ptr, theirs_ptr, word_ptr, n, left, whole,
                stop, k_row, v_row, S, S - T, window, factor, D, DV, WD, WV, BQ, BK, N, CAUSAL, WINDOW, BIAS, DOCS,
                TILED, ASM, False,
            )  # fmt: skip
    for n in tl.range(first, stop - whole, N, num_stages=STAGES):
        acc = _queries_step(
            q, do, t, mine, lse, delta, acc, k_ptr, v_ptr, list_ptr, bias_ptr, theirs_ptr, word_ptr, n, left, whole,
            stop, k_row, v_row, S, S - T, window, factor, D, DV, WD, WV, BQ, BK, N, CAUSAL, WINDOW, BIAS, DOCS, TILED,
            ASM, True,
        )  # fmt: skip
    c = tl.arange(0, WD)[None, :]
    spot = dq_ptr + b * dq_batch + h * dq_head + t.to(tl.int64)[:, None] * dq_row + c
    acc *= scale
    if ADD:
        acc += tl.load(spot, mask=real[:, None] & (c < D), other=0.0).to(tl.float32)
    tl.store(spot, acc.to(dq_ptr.dtype.element_ty), mask=real[:, None] & (c < D))
