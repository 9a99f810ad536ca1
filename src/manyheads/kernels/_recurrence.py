# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The Triton kernels of :mod:`manyheads.kernels.recurrence`, where their method and names stand.

Constants of a launch: C tokens of a chunk; X columns of x and y, Z of z, BX and BZ those a program holds of them; G
query heads share a key/value head; GATE ``none``, ``head`` or ``token``; OUT: rows are wanted, not only the state;
REVERSE: time runs backwards; ROLE: which pass it is, where there is a normaliser (empty without one); PACKED: sequences
stand one after the other; WHOLE: each is one segment, and its state at the other end is wanted beside the rows.
"""

import triton
import triton.language as tl

__all__ = ["chunks"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-128.0)  # 2^-128 times anything is nothing, and sums of it stay exact to 1e-3
_EPS = tl.constexpr(1e-6)


@triton.jit
def _tile(ptr, t, row, stop, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``t`` and columns ``first ..``, zeros outside."""
    c = first + tl.arange(0, WIDTH)
    held = (t < stop)[:, None]
    if D % WIDTH != 0:
        held = held & (c < D)[None, :]
    return tl.load(ptr + t.to(tl.int64)[:, None] * row + c[None, :], mask=held, other=0.0)


@triton.jit
def _where(s, owner_ptr, first_ptr, cu_ptr, T, L, per, PACKED: tl.constexpr):
    """Sequence, batch row and tokens ``begin .. stop`` of segment ``s``."""
    if PACKED:
        n = tl.load(owner_ptr + s)
        head = tl.load(cu_ptr + n).to(tl.int32)
        begin = head + (s - tl.load(first_ptr + n)) * L
        stop = tl.minimum(begin + L, tl.load(cu_ptr + n + 1).to(tl.int32))
        row = n * 0
    else:
        n = s // per
        row = n
        begin = (s - n * per) * L
        stop = tl.minimum(begin + L, T)
    return n.to(tl.int64), row.to(tl.int64), begin, stop


@triton.jit
def _gates(ptr, row, steady, at, stop, C: tl.constexpr, GATE: tl.constexpr):
    """Running total of the log2 decay within a chunk, and that after its last token."""
    i = tl.arange(0, C)
    if GATE == "token":
        g = tl.load(ptr + (at + i).to(tl.int64) * row, mask=at + i < stop, other=0.0)
        g = tl.maximum(g * _LOG2E, _LEAST)
        total = tl.cumsum(g, 0)
        last = tl.sum(g, 0)
    elif GATE == "head":
        total = steady * (i + 1).to(tl.float32)
        last = steady * tl.minimum(stop - at, C).to(tl.float32)
    else:
        total = tl.zeros([C], tl.float32)
        last = 0.0
    return total, last


@triton.jit
def _dot(x, y, acc, EXACT: tl.constexpr):
    """``x @ y + acc`` for ``y`` in float32, in the dtype of ``x``; EXACT: with what rounding takes from ``y``."""
    high = y.to(x.dtype)
    acc = tl.dot(x, high, acc, input_precision="ieee")
    if EXACT and x.dtype != tl.float32:
        acc = tl.dot(x, (y - high.to(tl.float32)).to(x.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def _times_state(x, state, EXACT: tl.constexpr):
    """``x @ state``; float16 goes as tf32, which has its mantissa and the range of the sums in the state."""
    if x.dtype == tl.float16:
        product = tl.dot(x.to(tl.float32), state, input_precision="tf32x3" if EXACT else "tf32")
    else:
        product = _dot(x, state, tl.zeros([x.shape[0], state.shape[1]], tl.float32), EXACT)
    return product


@triton.jit
def _carried(x, state, sums, row_r, row_c, enter, ROLE: tl.constexpr, EXACT: tl.constexpr):
    """What rows take from the state, and from its vector where that is their denominator."""
    acc = _times_state(x, state, EXACT)
    below = enter
    if ROLE == "dq":
        acc = acc * row_r[:, None] + row_c[:, None] * sums[None, :]
    if ROLE == "dk":
        acc += sums[None, :]
    if ROLE == "out":
        below = tl.sum(x.to(tl.float32) * sums[None, :], 1) * enter
    return acc * enter[:, None], below


@triton.jit
def _weights(
    x, y, total, row_r, row_c, col_r, col_c, scale, GATE: tl.constexpr, REVERSE: tl.constexpr, ROLE: tl.constexpr,
):  # fmt: skip
    """Decayed products of rows and columns, zeros where a row does not see a column."""
    i = tl.arange(0, x.shape[0])
    p = tl.dot(x, tl.trans(y), input_precision="ieee")
    if ROLE == "dq":
        p = p * row_r[:, None] + row_c[:, None]
    if ROLE == "dk":
        p = p * col_r[None, :] + col_c[None, :]
    if ROLE == "dv":
        p = p * col_r[None, :]
    if REVERSE:
        seen = i[:, None] <= i[None, :]
        gap = total[None, :] - total[:, None]
    else:
        seen = i[:, None] >= i[None, :]
        gap = total[:, None] - total[None, :]
    if GATE == "none":
        p = tl.where(seen, p * scale, 0.0)
    else:
        p = p * tl.exp2(tl.where(seen, gap, float("-inf"))) * scale
    return p


@triton.jit
def _grown(
    state, sums, y, z, weight, counted, PLAIN: tl.constexpr, NORM: tl.constexpr, OF_Z: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The state with ``y^T (weight z)``, and its vector with the tokens as they are counted."""
    if PLAIN:
        state = tl.dot(tl.trans(y), z, state, input_precision="ieee")
    else:
        state = _dot(tl.trans(y), z.to(tl.float32) * weight[:, None], state, EXACT)
    if NORM:
        source = z if OF_Z else y
        sums += tl.sum(source.to(tl.float32) * counted[:, None], 0)
    return state, sums


@triton.jit
def _divided(acc, below, below_ptr, floor_ptr, held, first, MLSTM: tl.constexpr):
    """Rows over their denominators; the program of the first columns keeps these, before the floor."""
    if first:
        tl.store(below_ptr, below, mask=held)
    if MLSTM:
        below = tl.maximum(tl.abs(below), tl.load(floor_ptr, mask=held, other=1.0))
    return acc * (1.0 / (below + _EPS))[:, None]


@triton.jit
def _start(spot, cells, inside, vector, held, SKIP: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr):
    """The state before a segment and its vector; zeros where the state is what is asked for."""
    if OUT:
        state = tl.load(spot + cells, mask=inside, other=0.0)
    else:
        state = tl.zeros(cells.shape, tl.float32)
    if OUT and NORM:
        sums = tl.load(spot + SKIP + vector, mask=held, other=0.0)
    else:
        sums = tl.zeros_like(vector).to(tl.float32)
    return state, sums


@triton.jit(do_not_specialize=["g_b", "g_h", "g_t", "T", "L", "per", "sequences", "state_x", "state_z"])
def chunks(
    x_ptr, y_ptr, z_ptr, w_ptr, g_ptr, r_ptr, c_ptr, floor_ptr, rows_ptr, out_ptr, aux_ptr, decay_ptr,
    owner_ptr, first_ptr, cu_ptr, x_b, x_h, x_t, y_b, y_h, y_t, z_b, z_h, z_t, w_b, w_h, w_t, g_b, g_h, g_t,
    o_b, o_h, o_t, T, L, per, sequences, state_x, state_z, scale,
    HEADS: tl.constexpr, G: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    BZ: tl.constexpr, GATE: tl.constexpr, OUT: tl.constexpr, REVERSE: tl.constexpr, ROLE: tl.constexpr,
    MLSTM: tl.constexpr, DG: tl.constexpr, PACKED: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (segment, head, columns): the segment's chunks one after the other, the state in registers."""
    TILES: tl.constexpr = (Z + BZ - 1) // BZ
    SHARED: tl.constexpr = G if OUT and not REVERSE else 1  # programs of a group of query heads
    PAIRS: tl.constexpr = G if REVERSE else 1  # heads of y and z of one program
    OF_Z: tl.constexpr = ROLE == "dq" or ROLE == "dk"  # the vector state belongs to z, not to y
    NORM: tl.constexpr = ROLE != "" and ROLE != "dv"
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES % (HEADS * SHARED)).to(tl.int64)
    s = tl.program_id(0) // (TILES * HEADS * SHARED)
    if PACKED:  # noqa: SIM102 - a constant, and a number on the device
        if tl.load(owner_ptr + s) >= sequences:
            return
    n, b, begin, stop = _where(s, owner_ptr, first_ptr, cu_ptr, T, L, per, PACKED)
    h = head // SHARED  # of keys and values
    i = tl.arange(0, C)
    u = tl.arange(0, BX)
    c = tile * BZ + tl.arange(0, BZ)
    g_ptr += b * g_b + h * g_h
    spot = rows_ptr + ((s + n + (1 if REVERSE == OUT else 0)) * HEADS + h) * SIZE  # see _Plan
    cells = u[:, None] * state_x + c[None, :] * state_z
    inside = (u < X)[:, None] & (c < Z)[None, :]
    vector = c if OF_Z else u
    held = vector < (Z if OF_Z else X)
    x_ptr += b * x_b + head * x_h
    out_ptr += b * o_b + head * o_h
    state, sums = _start(spot, cells, inside, vector, held, X * Z, OUT, NORM)
    steady = 0.0
    if GATE == "head":
        steady = tl.maximum(tl.load(g_ptr) * _LOG2E, _LEAST)
    faded = 0.0
    count = tl.cdiv(stop - begin, C)
    for step in range(count):
        at = begin + (count - 1 - step if REVERSE else step) * C
        t = at + i
        total, last = _gates(g_ptr, g_t, steady, at, stop, C, GATE)
        faded += last
        left = tl.exp2(tl.minimum(last - total, 0.0))
        enter = left if REVERSE else tl.exp2(total) * scale
        leave = tl.exp2(total) * scale if REVERSE else left
        here = (b * (HEADS * SHARED) + head) * T  # of numbers that go with the rows
        row_r, row_c, col_r, col_c = total, total, total, total
        if ROLE == "dq":
            row_r = tl.load(r_ptr + here + t, mask=t < stop, other=0.0)
            row_c = tl.load(c_ptr + here + t, mask=t < stop, other=0.0)
        if OUT:
            x = _tile(x_ptr, t, x_t, stop, 0, X, BX)
            acc, below = _carried(x, state, sums, row_r, row_c, enter, ROLE, DG)
        fade = tl.exp2(last)
        state *= fade
        if NORM:
            sums *= fade
        for pair in range(PAIRS):
            other = h * PAIRS + pair
            y = _tile(y_ptr + b * y_b + other * y_h, t, y_t, stop, 0, X, BX)
            z = _tile(z_ptr + b * z_b + other * z_h, t, z_t, stop, tile * BZ, Z, BZ)
            weight = leave
            if REVERSE and ROLE != "":
                there = (b * (HEADS * PAIRS) + other) * T + t
                col_r = tl.load(r_ptr + there, mask=t < stop, other=0.0)
                col_c = tl.load(c_ptr + there, mask=t < stop, other=0.0)
                weight = leave * col_r
                counted = leave * col_c
            else:
                counted = leave
            if OUT:
                p = _weights(x, y, total, row_r, row_c, col_r, col_c, scale, GATE, REVERSE, ROLE)
                if ROLE == "out":
                    below += tl.sum(p, 1)
                acc = tl.dot(p.to(z.dtype), z, acc, input_precision="ieee")
            state, sums = _grown(
                state, sums, y, z, weight, counted, GATE == "none" and not REVERSE, NORM, OF_Z, DG
            )  # fmt: skip
        if OUT:
            if ROLE == "out":
                acc = _divided(acc, below, aux_ptr + here + t, floor_ptr + here + t, t < stop, tile == 0, MLSTM)
            if DG:
                w = _tile(w_ptr + b * w_b + head * w_h, t, w_t, stop, tile * BZ, Z, BZ)
                part = tile.to(tl.int64) * (1 if PACKED else sequences) * (HEADS * SHARED) * T
                tl.store(aux_ptr + part + here + t, tl.sum(acc * w.to(tl.float32), 1), mask=t < stop)
            tl.store(
                out_ptr + t.to(tl.int64)[:, None] * o_t + c[None, :], acc.to(out_ptr.dtype.element_ty),
                mask=(t < stop)[:, None] & (c < Z)[None, :],
            )  # fmt: skip
    if WHOLE or not OUT:
        spot = rows_ptr + ((s + n + (0 if REVERSE else 1)) * HEADS + h) * SIZE
        first = head % SHARED == 0  # of the programs that have the same state
        tl.store(spot + cells, state, mask=inside & first)
        if NORM:
            tl.store(spot + X * Z + vector, sums, mask=held & first & (OF_Z or tile == 0))
    if not OUT:  # noqa: SIM102
        if tile == 0:
            tl.store(decay_ptr + s.to(tl.int64) * HEADS + h, faded)
