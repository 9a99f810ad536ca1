# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""A product of FP8 activations and INT4 weights on a GPU; :mod:`manyheads.attention.int4_fp8` says what it computes.

A program has a block of tokens and outputs and walks over groups of input channels, one group a step, both halves of
its nibbles. Codes become numbers in registers: nothing but half a byte per weight and its group's scale is read from
memory. With few tokens the groups are shared out among programs, whose sums are added afterwards: the weights alone
then decide the time, and every processor has to read.

FP8 (constant of a launch): the tensor cores multiply e4m3. Elsewhere, as in Triton's interpreter, e4m3 numbers are
multiplied as float16, which holds every one of them. With a table of FP8 numbers sigma c is rounded to e4m3; else c is
multiplied, and sigma multiplies the sum of a group. Sums are float32: FP8 tensor cores keep fewer bits than that, so
that they are added to the rest group by group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import UserError
from ._operator import launch, operator

__all__ = ["int4_fp8_matmul"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _e4m3_bits(bits):
    """Numbers of e4m3 codes, as float16, 256 times too small: its exponent has another bias."""
    bits = bits.to(tl.int16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _rounded(x):
    """float32 ``|x| <= 448`` rounded to what e4m3 holds, ties to even."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.where(exponent < -6, -6, exponent)
    # Adding 1.5 * 2^23 steps leaves no bits below a step, 2^(exponent - 3).
    large = ((exponent + 20 + 127) << 23 | 0x400000).to(tl.float32, bitcast=True)
    return (x + large) - large


@triton.jit
def _inputs(x_ptr, k, m, K, M, FP8: tl.constexpr):
    """Operand ``[HALF, ROWS]`` of inputs."""
    inside = (k < K)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * K + k[:, None]
    if FP8:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
    else:
        x = _e4m3_bits(tl.load(x_ptr + at, mask=inside, other=0))
    return x


@triton.jit
def _numbers(codes, sigma, FP8: tl.constexpr, EXACT: tl.constexpr):
    """Operand ``[COLUMNS, HALF]`` of nibbles."""
    c = codes.to(tl.float32) - 8.0
    if EXACT:
        w = c.to(tl.float8e4nv) if FP8 else c.to(tl.float16)
    elif FP8:
        w = (c * sigma[:, None]).to(tl.float8e4nv)
    else:
        w = _rounded(c * sigma[:, None]).to(tl.float16)
    return w


@triton.jit(do_not_specialize=["M"])
def _matmul(
    x_ptr, scale_ptr, w_ptr, sigma_ptr, out_ptr, M, N, K, GROUPS, factor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FP8: tl.constexpr, EXACT: tl.constexpr,
    SIGMA8: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (outputs, tokens, part): ``out [parts, M, N]`` of its share of the groups.

    The weight is the left factor: its numbers are made in registers, and tensor cores take the left one from there.
    """
    HALF: tl.constexpr = GROUP // 2
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part, parts = tl.program_id(2), tl.num_programs(2)
    share = tl.cdiv(GROUPS, parts)
    first = part * share
    last = tl.minimum(first + share, GROUPS)
    j = tl.arange(0, HALF)
    row = n.to(tl.int64) * GROUPS
    inside = n < N
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for g in tl.range(first, last, num_stages=STAGES):
        byte = tl.load(w_ptr + (row + g)[:, None] * HALF + j[None, :], mask=inside[:, None], other=0x88)
        sigma = tl.load(sigma_ptr + row + g, mask=inside, other=0)
        if SIGMA8:
            sigma = _e4m3_bits(sigma).to(tl.float32) * 256.0
        else:
            sigma = sigma.to(tl.float32)
        low = _inputs(x_ptr, g * GROUP + j, m, K, M, FP8)
        high = _inputs(x_ptr, g * GROUP + HALF + j, m, K, M, FP8)
        sums = tl.dot(_numbers(byte & 15, sigma, FP8, EXACT), low)
        sums = tl.dot(_numbers(byte >> 4, sigma, FP8, EXACT), high, sums)
        total += sums * sigma[:, None] if EXACT else sums
    token = tl.load(scale_ptr + m, mask=m < M, other=0.0).to(tl.float32) * factor
    if not FP8:
        token = token * 256.0
    at = (part.to(tl.int64) * M + m)[None, :] * N + n[:, None]
    result = (total * token[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, mask=inside[:, None] & (m < M)[None, :])


class _Config(NamedTuple):
    """Tokens and outputs of a block, warps of a program, depth of the loop's pipeline, parts of the groups."""

    rows: int
    columns: int
    warps: int
    stages: int
    parts: int


def _config(tokens: int, outputs: int, groups: int, processors: int) -> _Config:
    """Fixed by the shape, so that no first call spends its time on tuning."""
    if tokens <= 64:
        rows, columns, warps, stages = max(16, triton.next_power_of_2(tokens)), 64, 4, 4
    else:
        rows, columns, warps, stages = 128, 128, 8, 3
    blocks = triton.cdiv(tokens, rows) * triton.cdiv(outputs, columns)
    parts = max(1, min(2 * processors // blocks, groups // 4, 16))
    return _Config(rows, columns, warps, stages, parts)


@operator("int4_fp8_matmul")
def _op(
    x: Tensor, scale: Tensor, codes: Tensor, sigma: Tensor, group: int, factor: float, dtype: torch.dtype, exact: bool
) -> Tensor:
    (tokens, width), outputs, groups = x.shape, codes.shape[0], sigma.shape[1]
    if not tokens or not outputs:
        return x.new_zeros(tokens, outputs, dtype=dtype)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    fp8 = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9) and group >= 64
    config = _config(tokens, outputs, groups, processors)
    narrow = sigma.dtype == torch.float8_e4m3fn
    out = torch.empty(
        config.parts, tokens, outputs, dtype=dtype if config.parts == 1 else torch.float32, device=x.device
    )
    launch(
        _matmul, (triton.cdiv(outputs, config.columns), triton.cdiv(tokens, config.rows), config.parts),
        x if fp8 else x.view(torch.uint8), scale, codes, sigma.view(torch.uint8) if narrow else sigma, out,
        tokens, outputs, width, groups, factor, GROUP=group, ROWS=config.rows, COLUMNS=config.columns, FP8=fp8,
        EXACT=exact, SIGMA8=narrow, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return out[0] if config.parts == 1 else out.sum(0).to(dtype)


@_op.register_fake
def _(
    x: Tensor, scale: Tensor, codes: Tensor, sigma: Tensor, group: int, factor: float, dtype: torch.dtype, exact: bool
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


def int4_fp8_matmul(
    x: Tensor, scale: Tensor, codes: Tensor, sigma: Tensor, *, group: int, factor: float, dtype: torch.dtype,
    exact: bool = False,
) -> Tensor:  # fmt: skip
    """``y[m, n] = factor scale[m] sum_k x[m, k] w[n, k]``, ``[M, N]`` in ``dtype``, with float32 sums.

    Args:
        x: float8_e4m3fn ``[M, K]``.
        scale: of the tokens, ``[M]``, float32 or bfloat16.
        codes: ``uint8 [N, P / 2]``, P = K rounded up to whole groups; see :mod:`manyheads.attention.int4_fp8`.
        sigma: scales of the groups ``[N, P / group]``, float8_e4m3fn or bfloat16.
        group: 32, 64 or 128 channels.
        factor: on everything.
        dtype: float32, float16 or bfloat16.
        exact: multiply codes by scales in float32 and not in e4m3.

    Raises:
        UserError: shapes or dtypes that are not these.
    """
    groups = -(-x.shape[-1] // group)
    fits = (
        x.ndim == 2 and x.dtype == torch.float8_e4m3fn and scale.shape == x.shape[:1] and dtype in _DTYPES
        and codes.dtype == torch.uint8 and sigma.dtype in (torch.float8_e4m3fn, torch.bfloat16)
        and sigma.shape == (codes.shape[0], groups) and codes.shape[1] == groups * group // 2
        and group in (32, 64, 128)
    )  # fmt: skip
    if not fits:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (x, scale, codes, sigma))
        raise UserError(f"int4_fp8_matmul of {given} in groups of {group} to {dtype}")
    result: Tensor = _op(
        x.contiguous(), scale.contiguous(), codes.contiguous(), sigma.contiguous(), group, factor, dtype, exact
    )
    return result
