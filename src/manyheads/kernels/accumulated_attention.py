# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""How much attention each key received, and the log-sum-exp of each query, without a map of T x S.

Two passes over blocks of logits, both on the tensor cores with float32 sums: the first keeps the running maximum and
sum of every query (as FlashAttention does, arXiv 2205.14135) and gives its log-sum-exp; the second makes the weights
anew, ``exp(logit - lse)``, and adds them up per key. Only T + S numbers a head are kept. The queries of a group are
laid side by side (row r is query r // G of head r % G), so that a key is read once for its group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import UserError
from ._operator import LOG2E, launch, operator

__all__ = ["accumulated_attention", "lse"]

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(
    ptr, first, head_stride, row_stride, T, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Queries of rows ``first ..`` ``[M, WIDTH]`` and the position ``[M]`` of each; zeros past the last."""
    r = first + tl.arange(0, M)
    c = tl.arange(0, WIDTH)
    at = (r % G).to(tl.int64) * head_stride + (r // G).to(tl.int64) * row_stride
    q = tl.load(ptr + at[:, None] + c[None, :], mask=(r < T * G)[:, None] & (c < D)[None, :], other=0.0)
    return q, r // G


@triton.jit
def _keys(ptr, first, row_stride, S, D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Keys ``first ..`` ``[N, WIDTH]``; zeros past the last."""
    n = first + tl.arange(0, N)
    c = tl.arange(0, WIDTH)
    return tl.load(
        ptr + n.to(tl.int64)[:, None] * row_stride + c[None, :], mask=(n < S)[:, None] & (c < D)[None, :], other=0.0
    )


@triton.jit
def _lse_step(
    q, t, top, total, k_ptr, first, k_row, T, S, factor, D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    x = tl.dot(q, tl.trans(_keys(k_ptr, first, k_row, S, D, WIDTH, N)), input_precision="tf32x3")
    if MASK:
        seen = (first + tl.arange(0, N))[None, :] <= (t + (S - T))[:, None]
        x = tl.where(seen, x, float("-inf"))
    new = tl.maximum(top, tl.max(x, 1) * factor)
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x * factor - base[:, None]), 1)
    return new, total


@triton.jit(do_not_specialize=["T", "S", "splits"])
def _lse(
    q_ptr, k_ptr, out_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, HEADS, T, S, factor, splits,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (rows, pair, split): log-sum-exp of M rows over one share of the keys; out ``[splits, B, H, T]``."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the rows that see most start first
    pair = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    q_ptr += pair // HEADS * q_batch + pair % HEADS * G * q_head
    k_ptr += pair // HEADS * k_batch + pair % HEADS * k_head
    q, t = _rows(q_ptr, first, q_head, q_row, T, G, D, WIDTH, M)
    most = tl.minimum((first + M - 1) // G, T - 1) + S - T + 1  # keys that the last row sees
    least = tl.maximum(first // G + S - T + 1, 0)  # and the first one
    share = tl.cdiv(tl.cdiv(most, splits), N) * N
    start = split * share
    stop = tl.minimum(start + share, most)
    middle = tl.maximum(start, tl.minimum(stop, least) // N * N)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for n in tl.range(start, middle, N, num_stages=STAGES):
        top, total = _lse_step(q, t, top, total, k_ptr, n, k_row, T, S, factor, D, WIDTH, N, False)
    for n in tl.range(middle, stop, N, num_stages=STAGES):
        top, total = _lse_step(q, t, top, total, k_ptr, n, k_row, T, S, factor, D, WIDTH, N, True)
    r = first + tl.arange(0, M)
    at = ((split * tl.num_programs(1) + pair) * G + r % G) * T + r // G
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total)) * _LN2
    tl.store(out_ptr + at, lse, mask=r < T * G)


@triton.jit
def _mass_step(
    k, n, total, q_ptr, lse_ptr, first, q_head, q_row, T, S, factor, G: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    q, t = _rows(q_ptr, first, q_head, q_row, T, G, D, WIDTH, M)
    r = first + tl.arange(0, M)
    lse = tl.load(lse_ptr + (r % G) * T + t, mask=r < T * G, other=float("inf")) * (1.0 / _LN2)
    x = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    p = tl.exp2(x * factor - lse[None, :])
    if MASK:
        p = tl.where(n[:, None] <= (t + (S - T))[None, :], p, 0.0)
    return total + tl.sum(p, 1)


@triton.jit(do_not_specialize=["T", "S"])
def _mass(
    q_ptr, k_ptr, lse_ptr, out_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, HEADS, T, S, factor,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (keys, pair): sum of the weights on N keys over all rows that see them; out ``[B, Hkv, S]``."""
    start = tl.program_id(0) * N  # early keys are seen by most rows and start first
    pair = tl.program_id(1).to(tl.int64)
    q_ptr += pair // HEADS * q_batch + pair % HEADS * G * q_head
    k_ptr += pair // HEADS * k_batch + pair % HEADS * k_head
    lse_ptr += pair * G * T
    k = _keys(k_ptr, start, k_row, S, D, WIDTH, N)
    n = start + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    some = tl.minimum(tl.maximum(start - (S - T), 0), T) * G // M * M  # rows that see the first key, and the last one
    full = tl.minimum(tl.cdiv(tl.maximum(start + N - 1 - (S - T), 0) * G, M) * M, tl.cdiv(T * G, M) * M)
    for r in tl.range(some, full, M, num_stages=STAGES):
        total = _mass_step(k, n, total, q_ptr, lse_ptr, r, q_head, q_row, T, S, factor, G, D, WIDTH, M, True)
    for r in tl.range(full, T * G, M, num_stages=STAGES):
        total = _mass_step(k, n, total, q_ptr, lse_ptr, r, q_head, q_row, T, S, factor, G, D, WIDTH, M, False)
    tl.store(out_ptr + pair * S + n, total, mask=n < S)


class _Config(NamedTuple):
    """Queries and keys of a block, warps of a program, depth of the loop's pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def _config(kind: str, dim: int, itemsize: int) -> _Config:
    """Fixed, so that no first call spends its time on tuning. ``kind``: ``lse`` or ``accumulated_attention``."""
    if itemsize == 4:
        return _Config(64 if dim <= 128 else 32, 32, 4, 2)
    if kind == "lse":
        return _Config(128, 128 if dim <= 128 else 64, 8, 2)
    return _Config(128, 64, 4, 3) if dim <= 128 else _Config(64, 128, 8, 2)


def _strides(x: Tensor) -> tuple[int, int, int]:
    batch, head, row, _ = x.stride()
    return batch, head, row


@operator("attention_lse")
def _lse_op(q: Tensor, k: Tensor, scale: float) -> Tensor:
    (batch, heads, length, dim), (_, kv_heads, size, _) = q.shape, k.shape
    if q.numel() == 0 or size == 0:
        return q.new_full((batch, heads, length), -torch.inf, dtype=torch.float32)
    group, pairs = heads // kv_heads, batch * kv_heads
    config = _config("lse", dim, q.element_size())
    blocks = triton.cdiv(length * group, config.rows)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    # A few queries fill no device by themselves: their keys are shared out too, four blocks at least to a share.
    splits = max(1, min(processors * 2 // (blocks * pairs), size // (4 * config.keys)))
    out = q.new_empty(splits, batch, heads, length, dtype=torch.float32)
    launch(
        _lse, (blocks, pairs, splits),
        q, k, out, *_strides(q), *_strides(k), kv_heads, length, size, scale * LOG2E, splits,
        G=group, D=dim, WIDTH=max(16, triton.next_power_of_2(dim)), M=config.rows, N=config.keys,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return out[0] if splits == 1 else out.logsumexp(0)


@operator("accumulated_attention")
def _mass_op(q: Tensor, k: Tensor, scale: float) -> Tensor:
    (batch, heads, length, dim), (_, kv_heads, size, _) = q.shape, k.shape
    out = q.new_zeros(batch, kv_heads, size, dtype=torch.float32)
    if q.numel() == 0 or size == 0:
        return out
    config = _config("mass", dim, q.element_size())
    sums = _lse_op(q, k, scale)
    launch(
        _mass, (triton.cdiv(size, config.keys), batch * kv_heads),
        q, k, sums, out, *_strides(q), *_strides(k), kv_heads, length, size, scale * LOG2E,
        G=heads // kv_heads, D=dim, WIDTH=max(16, triton.next_power_of_2(dim)), M=config.rows, N=config.keys,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return out


@_lse_op.register_fake
def _(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@_mass_op.register_fake
def _(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q.new_empty(k.shape[:3], dtype=torch.float32)


def _checked(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3] or q.dtype != k.dtype or not scale > 0:
        given = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, scale {scale}"
        raise UserError(f"accumulated attention of {given}")
    return (q if q.stride(3) == 1 else q.contiguous()), (k if k.stride(3) == 1 else k.contiguous())


def lse(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Log-sum-exp of the logits of each query, causal. No gradient.

    Args:
        q: queries ``[B, H, T, d]``; query t stands at column ``S - T + t``.
        k: keys ``[B, Hkv, S, d]`` of the same dtype.
        scale: positive factor on ``q k^T``.

    Returns:
        ``[B, H, T]`` float32; -inf for a query that sees no key.
    """
    out: Tensor = _lse_op(*_checked(q, k, scale), scale)
    return out


def accumulated_attention(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Sum of the causal softmax weights on each key, over all queries and over the heads of its group. No gradient.

    Args:
        q: queries ``[B, H, T, d]``; query t stands at column ``S - T + t``.
        k: keys ``[B, Hkv, S, d]`` of the same dtype.
        scale: positive factor on ``q k^T``.

    Returns:
        ``[B, Hkv, S]`` float32; over S it adds up to ``T * H / Hkv`` (less the queries that see no key).
    """
    out: Tensor = _mass_op(*_checked(q, k, scale), scale)
    return out
