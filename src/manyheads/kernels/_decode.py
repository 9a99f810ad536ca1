# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The Triton kernels of :mod:`manyheads.kernels.decode`, where their method stands.

Constants of a launch: G query heads share a key/value head and fill ROWS rows of a matrix fragment; D channels; BLOCK
tokens a step; CODEC ``plain``, ``int4`` or ``fp8``, in PIECES; ASM: turn codes into numbers by PTX, not by Triton's own
operations; these each of keys (K_) and of values (V_), of which both or none are plain; LAST: there is one part, so the
partial result is the result; PDL: a kernel may start before its predecessor has ended, and waits for it itself.
"""

import triton
import triton.language as tl

__all__ = ["combine", "partial"]

_LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def _asm(codec: str, piece: int) -> str:
    """PTX that turns two 16-bit elements of codes into two float16, those of piece ``piece``."""
    byte, high = divmod(piece, 2)
    if codec == "int4":
        # The nibble goes into the mantissa of 1024, where it counts 1 (low) or 16 (high); fma(t, 1, -1032) or
        # fma(t, 1/16, -72) is the code.
        move = "shr.u32 t, $1, 8;" if byte else "mov.b32 t, $1;"
        mask, times, minus = (
            ("0x00F000F0", "0x2C002C00", "0xD480D480") if high else ("0x000F000F", "0x3C003C00", "0xE408E408")
        )
        work = f"{move} lop3.b32 t, t, {mask}, 0x64006400, 0xEA; mov.b32 u, {times}; mov.b32 v, {minus};"
        return f"{{.reg .b32 t, u, v; {work} fma.rn.f16x2 $0, t, u, v;}}"
    # An e4m3 number has the bits of a float16 of another bias, 2^8 times too small: sign to bit 15, the rest to 13..7.
    move = "mov.b32 s, $1; shr.u32 t, $1, 1;" if piece else "shl.b32 s, $1, 8; shl.b32 t, $1, 7;"
    return f"{{.reg .b32 s, t; {move} and.b32 s, s, 0x80008000; lop3.b32 $0, t, 0x3F803F80, s, 0xEA;}}"


@triton.jit
def _numbers(x, like, PIECE: tl.constexpr, CODEC: tl.constexpr, ASM: tl.constexpr):
    """Piece ``PIECE`` of the elements ``x`` as numbers of the dtype of ``like``: codes, those of FP8 divided by 256."""
    if CODEC == "plain":
        y = x
    elif ASM:
        asm: tl.constexpr = _asm(CODEC, PIECE)
        y = tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    elif CODEC == "int4":
        y = (((x >> (4 * PIECE)) & 15) - 8).to(like.dtype)
    else:
        x = x >> (8 * PIECE)
        y = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(like.dtype)
    return y


@triton.jit
def _queries(q_ptr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, CODEC: tl.constexpr):
    """The pieces of the queries, and a power of two that they were divided by.

    Codes are float16 where the queries have 16 bits. The largest magnitude of a query is brought to 1 .. 2 for that:
    bfloat16 has fewer mantissa bits than float16 but a wider range.
    """
    g = tl.arange(0, ROWS)
    queries = ()
    for i in tl.static_range(PIECES):
        at = g[:, None] * D + _channels(i, PIECES, CODEC, D)[None, :]
        queries += (tl.load(q_ptr + at, mask=(g < G)[:, None], other=0.0),)
    unit = 1.0
    if CODEC != "plain" and queries[0].dtype != tl.float32:
        most = tl.abs(queries[0].to(tl.float32))
        for i in tl.static_range(1, PIECES):
            most = tl.maximum(most, tl.abs(queries[i].to(tl.float32)))
        most = tl.max(most)
        unit = tl.exp2(tl.floor(tl.log2(tl.where(most == 0.0, 1.0, most))))
        small = ()
        for i in tl.static_range(PIECES):
            small += ((queries[i].to(tl.float32) / unit).to(tl.float16),)
        queries = small
    return queries, unit


@triton.jit
def _channels(PIECE: tl.constexpr, PIECES: tl.constexpr, CODEC: tl.constexpr, D: tl.constexpr):
    """Channels of piece ``PIECE``, one for each element of a row."""
    c = tl.arange(0, D // PIECES)
    if CODEC == "int4":  # byte b of an element holds two channels, D / 2 apart
        c = c * (PIECES // 2) + PIECE // 2 + (PIECE % 2) * (D // 2)
    elif CODEC == "fp8":
        c = c * PIECES + PIECE
    return c


@triton.jit
def _soon(ptr):
    """Bring scales to the L2 cache: fetched from memory only a block ahead, they come too late."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _scales(k_scale, v_scale, held, factor, FULL: tl.constexpr):
    """Factor and summand of the logits of a block; codes of values are divided by FULL.

    The summand, the logarithm of the value's scale, makes the exponential of a logit the weight times that scale, so
    that the value needs none; the sum of the weights takes it back. It hides tokens that are not held.
    """
    lift = tl.log2(v_scale.to(tl.float32) * FULL)
    return k_scale.to(tl.float32) * factor, tl.where(held, tl.where(lift < -100.0, -100.0, lift), float("-inf"))


@triton.jit
def _span(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, start, stop, factor,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    K_PIECES: tl.constexpr, K_CODEC: tl.constexpr, K_ASM: tl.constexpr,
    V_PIECES: tl.constexpr, V_CODEC: tl.constexpr, V_ASM: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Attention of the G queries at ``q_ptr`` over the tokens ``start .. stop`` of one head."""
    K_WIDTH: tl.constexpr = D // K_PIECES
    V_WIDTH: tl.constexpr = D // V_PIECES
    g = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    queries, unit = _queries(q_ptr, G, ROWS, D, K_PIECES, K_CODEC)
    acc = ()
    for _ in tl.static_range(V_PIECES):
        acc += (tl.zeros([ROWS, V_WIDTH], tl.float32),)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    # Float16 weights reach up to 2^15, so that those far below the largest do not vanish.
    ROOM: tl.constexpr = 15.0 if queries[0].dtype == tl.float16 else 0.0
    V_FULL: tl.constexpr = 256.0 if V_CODEC == "fp8" else 1.0
    factor *= unit * (256.0 if K_CODEC == "fp8" else 1.0)
    k_ptr += start.to(tl.int64) * K_WIDTH
    v_ptr += start.to(tl.int64) * V_WIDTH
    k_cells = n[:, None] * K_WIDTH + tl.arange(0, K_WIDTH)[None, :]
    v_cells = n[:, None] * V_WIDTH + tl.arange(0, V_WIDTH)[None, :]
    if K_CODEC != "plain":  # scales are too narrow for the pipeline of the loop: fetched one block ahead by hand
        k_scale_ptr += start
        v_scale_ptr += start
        if K_ASM:  # noqa: SIM102 - a constant, and a number on the device
            if start < stop:
                for i in tl.static_range(1, STAGES):
                    _soon(k_scale_ptr + tl.minimum(i * BLOCK + n, stop - start - 1))
                    _soon(v_scale_ptr + tl.minimum(i * BLOCK + n, stop - start - 1))
        left = n < stop - start
        k_scale = tl.load(k_scale_ptr + n, mask=left, other=0.0)
        v_scale = tl.load(v_scale_ptr + n, mask=left, other=1.0)
        k_scale, lift = _scales(k_scale, v_scale, left, factor, V_FULL)
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        held = n < stop - first
        keys = tl.load(k_ptr + k_cells, mask=held[:, None], other=0)
        values = tl.load(v_ptr + v_cells, mask=held[:, None], other=0)
        if K_CODEC != "plain":
            k_scale_ptr += BLOCK
            v_scale_ptr += BLOCK
            left = n < stop - first - BLOCK
            if K_ASM:
                ahead = tl.minimum((STAGES - 1) * BLOCK + n, stop - first - BLOCK - 1)
                _soon(k_scale_ptr + ahead)
                _soon(v_scale_ptr + ahead)
            next_k_scale = tl.load(k_scale_ptr + n, mask=left, other=0.0)
            next_v_scale = tl.load(v_scale_ptr + n, mask=left, other=1.0)
        x = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in tl.static_range(K_PIECES):
            y = _numbers(keys, queries[i], i, K_CODEC, K_ASM)
            x = tl.dot(queries[i], tl.trans(y), x, input_precision="tf32x3")
        if K_CODEC == "plain":
            x = tl.where(held[None, :], x * factor, float("-inf"))
        else:
            x = x * k_scale[None, :] + lift[None, :]
        new = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new) - ROOM
        shrink = tl.exp2(top - ROOM - base)
        p = tl.exp2(x - base[:, None])
        if K_CODEC == "plain":
            total = total * shrink[:, None] + p
        else:
            total = total * shrink[:, None] + p * tl.exp2(-tl.maximum(lift, -100.0))[None, :]
        top = new
        p = p.to(queries[0].dtype)
        grown = ()
        for i in tl.static_range(V_PIECES):
            y = _numbers(values, queries[0], i, V_CODEC, V_ASM)
            grown += (tl.dot(p, y, acc[i] * shrink[:, None], input_precision="tf32x3"),)
        acc = grown
        k_ptr += BLOCK * K_WIDTH
        v_ptr += BLOCK * V_WIDTH
        if K_CODEC != "plain":
            k_scale, lift = _scales(next_k_scale, next_v_scale, left, factor, V_FULL)
    sums = tl.sum(total, 1)
    share = 1.0 / tl.where(sums == 0.0, 1.0, sums)
    for i in tl.static_range(V_PIECES):
        at = g[:, None] * D + _channels(i, V_PIECES, V_CODEC, D)[None, :]
        tl.store(out_ptr + at, acc[i] * share[:, None], mask=(g < G)[:, None])
    lse = tl.where(sums == 0.0, float("-inf"), top - ROOM + tl.log2(sums))
    tl.store(lse_ptr + g, lse * _LN2 if LAST else lse, mask=g < G)


@triton.jit
def _shares(lengths, programs, pairs, LEAST: tl.constexpr):
    """Tokens of a program, and the program behind the last one of each pair, by the ``lengths`` of all pairs."""
    share = tl.maximum(tl.cdiv(tl.sum(tl.cdiv(lengths, 16), 0), programs - pairs) * 16, LEAST)
    return share, tl.cumsum(tl.cdiv(lengths, share), 0)


@triton.jit(do_not_specialize=["programs", "pairs", "recent_size"])
def partial(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, recent_k_ptr, recent_v_ptr, recent_length_ptr, offset_ptr,
    length_ptr, out_ptr, lse_ptr, factor, programs, pairs, recent_size, recent_stride,
    LENGTHS: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, K_PIECES: tl.constexpr, K_CODEC: tl.constexpr,
    K_ASM: tl.constexpr, V_PIECES: tl.constexpr, V_CODEC: tl.constexpr, V_ASM: tl.constexpr, RECENT: tl.constexpr,
    LAST: tl.constexpr, PDL: tl.constexpr, RECENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program reads a share of the tokens of one (row, key/value head), a pair; those behind them recent tokens."""
    slot = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    out_ptr += slot.to(tl.int64) * G * D
    lse_ptr += slot.to(tl.int64) * G
    if slot < programs:
        if LENGTHS > 0:  # no load waits for another one: what belongs to the pair is picked from what all loaded
            i = tl.arange(0, LENGTHS)
            lengths = tl.load(length_ptr + i, mask=i < pairs, other=0)
            offsets = tl.load(offset_ptr + i, mask=i < pairs, other=0)
            share, ends = _shares(lengths, programs, pairs, BLOCK)
            before = ends <= slot
            pair = tl.sum(before.to(tl.int32), 0)
            start = (slot - tl.max(tl.where(before, ends, 0), 0)) * share
            length = tl.sum(tl.where(i == pair, lengths, 0), 0)
            offset = tl.sum(tl.where(i == pair, offsets, 0), 0)
            stop = tl.minimum(start + share, length)
        else:
            pair = slot
            start = slot * 0
            stop = tl.load(length_ptr + pair)
            offset = tl.load(offset_ptr + pair)
        pair = pair.to(tl.int64)
        if pair < pairs:
            _span(
                q_ptr + pair * G * D, k_ptr + offset * (D // K_PIECES), v_ptr + offset * (D // V_PIECES),
                k_scale_ptr + offset, v_scale_ptr + offset, out_ptr, lse_ptr, start, stop, factor,
                G, ROWS, D, BLOCK, STAGES, K_PIECES, K_CODEC, K_ASM, V_PIECES, V_CODEC, V_ASM, LAST,
            )  # fmt: skip
    elif RECENT:
        pair = (slot - programs).to(tl.int64)
        length = tl.load(recent_length_ptr + pair // HEADS * recent_stride)
        at = pair * recent_size * D
        _span(
            q_ptr + pair * G * D, recent_k_ptr + at, recent_v_ptr + at, q_ptr, q_ptr, out_ptr, lse_ptr, length * 0,
            length, factor, G, ROWS, D, RECENT_BLOCK, STAGES, 1, "plain", False, 1, "plain", False, LAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "pairs"])
def combine(
    part_ptr, part_lse_ptr, length_ptr, out_ptr, lse_ptr, programs, pairs,
    LENGTHS: tl.constexpr, LEAST: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, RECENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, columns): the partial outputs of a query head, each by its share of the exponentials."""
    head = tl.program_id(0)
    pair = head // G
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = pair
    end = pair + 1
    if LENGTHS > 0:
        i = tl.arange(0, LENGTHS)
        _share, ends = _shares(tl.load(length_ptr + i, mask=i < pairs, other=0), programs, pairs, LEAST)
        end = tl.sum(tl.where(i == pair, ends, 0), 0)
        first = tl.sum(tl.where(i == pair - 1, ends, 0), 0)
    if PDL:  # lengths were there before the kernel that is waited for
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    count = end - first
    if RECENT:  # one more, that stands behind those of all pairs
        count += 1
    top = float("-inf")
    total = 0.0
    out = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, PARTS):
        s = start + tl.arange(0, PARTS)
        held = s < count
        slots = first + s
        if RECENT:
            slots = tl.where(s == count - 1, programs + pair, slots)
        slots = slots.to(tl.int64) * G + head % G
        lse = tl.load(part_lse_ptr + slots, mask=held, other=float("-inf"))
        part = tl.load(part_ptr + slots[:, None] * D + c[None, :], mask=held[:, None], other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(part * weight[:, None], 0)
        top = new
    tl.store(out_ptr + head.to(tl.int64) * D + c, out / tl.where(total == 0.0, 1.0, total))
    tl.store(lse_ptr + head, (top + tl.log2(total)) * _LN2)
