# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The Triton kernels of :mod:`manyheads.kernels.product_codes`, where their method stands.

Constants of a launch: HEADS key/value heads, each shared by G query heads that fill ROWS rows; GROUPS sub-vectors with
CENTROIDS centroids each; D channels of a value, of BITS bits each; BLOCK tokens a step.
"""

import triton
import triton.language as tl

__all__ = ["gather", "logits", "narrow", "nearest"]


@triton.jit(do_not_specialize=["count", "book_stride"])
def nearest(
    k_ptr, books_ptr, out_ptr, count, book_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, CENTROIDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """Program (pair and sub-vector, block): number of the nearest centroid of BLOCK tokens, WAYS at a time."""
    pair = tl.program_id(0).to(tl.int64) // GROUPS
    group = tl.program_id(0).to(tl.int64) % GROUPS
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = n < count
    c = tl.arange(0, WAYS)
    k_ptr += (pair * count + n) * (GROUPS * WIDTH) + group * WIDTH
    books_ptr += pair // HEADS * book_stride + (pair % HEADS * GROUPS + group) * CENTROIDS * WIDTH
    least = tl.full([BLOCK], float("inf"), tl.float32)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, CENTROIDS, WAYS):
        there = first + c < CENTROIDS
        far = tl.zeros([BLOCK, WAYS], tl.float32)
        for j in range(WIDTH):
            x = tl.load(k_ptr + j, mask=held, other=0.0).to(tl.float32)
            y = tl.load(books_ptr + (first + c) * WIDTH + j, mask=there, other=0.0).to(tl.float32)
            apart = x[:, None] - y[None, :]
            far += apart * apart
        far = tl.where(there[None, :], far, float("inf"))
        closest, number = tl.min(far, 1), tl.argmin(far, 1)
        found = tl.where(closest < least, first + number, found)
        least = tl.minimum(closest, least)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * count + n, found.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["count", "stride"])
def logits(
    table_ptr, codes_ptr, first_ptr, mask_ptr, out_ptr, lse_ptr, count, stride,
    HEADS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, CENTROIDS: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Program (pair, block): logits of BLOCK tokens of a key/value head, and their log-sum-exp."""
    pair = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, ROWS)
    held = n < count
    x = tl.zeros([BLOCK, ROWS], tl.float32)
    codes_ptr += pair * GROUPS * stride
    table_ptr += pair * GROUPS * CENTROIDS * G
    for i in range(GROUPS):
        code = tl.load(codes_ptr + i * stride + n, mask=held, other=0).to(tl.int32)
        at = (i * CENTROIDS + code)[:, None] * G + r[None, :]
        x += tl.load(table_ptr + at, mask=held[:, None] & (r < G)[None, :], other=0.0)
    seen = held & (n >= tl.load(first_ptr + pair // HEADS))
    if MASKED:
        seen = seen & (tl.load(mask_ptr + pair // HEADS * count + n, mask=held, other=0) != 0)
    x = tl.where(seen[:, None], x, float("-inf"))
    out = out_ptr + (pair * G + r)[None, :] * count + n[:, None]
    tl.store(out, x, mask=held[:, None] & (r < G)[None, :])
    top = tl.max(x, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(x - base[None, :]), 0)
    lse = tl.where(total == 0.0, float("-inf"), base + tl.log(total))
    tl.store(lse_ptr + (pair * G + r) * tl.num_programs(1) + block, lse, mask=r < G)


@triton.jit
def _ordered(x):
    """Numbers as unsigned integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _descend(part_ptr, need, chunks, CHUNKS: tl.constexpr, WAYS: tl.constexpr):
    """The last of WAYS thresholds above which there is still enough, as its number; 0 where no one has."""
    c = tl.arange(0, CHUNKS)
    j = tl.arange(0, WAYS)
    part = tl.load(part_ptr + c[:, None] * WAYS + j[None, :], mask=(c < chunks)[:, None], other=0.0)
    return tl.maximum(tl.sum((tl.sum(part, 0) >= need).to(tl.int32), 0) - 1, 0)


@triton.jit(do_not_specialize=["count", "shift", "chunks", "pass_"])
def narrow(
    x_ptr, lse_ptr, need_ptr, last_ptr, part_ptr, prefix_ptr, count, shift, chunks, pass_,
    CHUNKS: tl.constexpr, WAYS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Program (head, chunk): the mass, or number, of the logits at or above each of WAYS thresholds.

    The thresholds go on from the one that the pass before found for this head, BITS bits finer.
    """
    head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heads = tl.num_programs(0)
    lse = tl.load(lse_ptr + head)
    prefix = (head * 0).to(tl.uint32)
    if pass_ > 0:
        before = tl.load(prefix_ptr + (pass_ - 1) * heads + head).to(tl.uint32, bitcast=True)
        digit = _descend(last_ptr + head * chunks * WAYS, tl.load(need_ptr + head), chunks, CHUNKS, WAYS)
        prefix = before | (digit.to(tl.uint32) << (shift + BITS).to(tl.uint32))
    if chunk == 0:
        tl.store(prefix_ptr + pass_ * heads + head, prefix.to(tl.int32, bitcast=True))
    j = tl.arange(0, WAYS)
    bound = prefix | (j.to(tl.uint32) << shift.to(tl.uint32))
    share = tl.cdiv(tl.cdiv(count, chunks), BLOCK) * BLOCK
    start = chunk * share
    total = tl.zeros([BLOCK, WAYS], tl.float32)
    for first in range(start, tl.minimum(start + share, count), BLOCK):
        n = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + head * count + n, mask=n < count, other=float("-inf"))
        if COUNTED:
            mass = tl.where(x > float("-inf"), 1.0, 0.0)
        else:
            mass = tl.exp(x - lse)
        total += tl.where(_ordered(x)[:, None] >= bound[None, :], mass[:, None], 0.0)
    tl.store(part_ptr + (head * chunks + chunk) * WAYS + j, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count", "scale_stride"])
def gather(
    x_ptr, lse_ptr, lowest_ptr, values_ptr, scale_ptr, out_ptr, mass_ptr, fetched_ptr, count, row_stride, scale_stride,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Program (pair, split): the kept values of a share of the tokens, by their weights; others are not read."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    r = tl.arange(0, ROWS)
    width: tl.constexpr = D // 2 if BITS == 4 else D  # of a row where it lies
    d = tl.arange(0, width)
    lse = tl.load(lse_ptr + pair * G + r, mask=r < G, other=0.0)
    lowest = tl.load(lowest_ptr + pair * G + r, mask=r < G, other=float("inf"))
    share = tl.cdiv(tl.cdiv(count, splits), BLOCK) * BLOCK
    start = split * share
    acc = tl.zeros([ROWS, width], tl.float32)
    high = tl.zeros([ROWS, width], tl.float32)  # second half of the channels, which shares bytes with the first
    mass = tl.zeros([ROWS], tl.float32)
    fetched = split * 0
    for first in range(start, tl.minimum(start + share, count), BLOCK):
        n = first + tl.arange(0, BLOCK)
        at = (pair * G + r)[:, None] * count + n[None, :]
        x = tl.load(x_ptr + at, mask=(r < G)[:, None] & (n < count)[None, :], other=float("-inf"))
        kept = (x >= lowest[:, None]) & (x > float("-inf"))
        p = tl.where(kept, tl.exp(x - lse[:, None]), 0.0)
        needed = tl.max(kept.to(tl.int32), 0)
        many = tl.sum(needed, 0)
        if many > 0:
            fetched += many
            mass += tl.sum(p, 1)
            rows = n.to(tl.int64) * row_stride + pair * width
            v = tl.load(values_ptr + rows[:, None] + d[None, :], mask=(needed > 0)[:, None], other=0)
            if BITS < 16:
                scale = tl.load(scale_ptr + pair * scale_stride + n, mask=needed > 0, other=0.0).to(tl.float32)
                if BITS == 8:
                    # An e4m3 number has the bits of a float16 that is 256 times too small.
                    bits = v.to(tl.int32)
                    v = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
                    scale = scale * 256.0
                p = p * scale[None, :]
            if BITS == 4:
                upper = (v.to(tl.int32) >> 4).to(tl.float32) - 8.0
                high = tl.dot(p, upper, high, input_precision="tf32x3")
                v = (v.to(tl.int32) & 15).to(tl.float32) - 8.0
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="tf32x3")
    slot = pair * splits + split
    out = out_ptr + (slot * ROWS + r)[:, None] * D + d[None, :]
    tl.store(out, acc, mask=(r < G)[:, None])
    if BITS == 4:
        tl.store(out + width, high, mask=(r < G)[:, None])
    tl.store(mass_ptr + slot * ROWS + r, mass, mask=r < G)
    tl.store(fetched_ptr + slot, fetched)
