# SPDX-License-Identifier: Apache-2.0
"""INT4 weights times FP8 activations under Triton's interpreter: reference, torch path and kernel agree."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.int4_cases import LIMIT, build, worst, wrong_variants
from kernels.interpreted import _mended  # noqa: F401 - a fixture that mends the interpreter
from manyheads import UserError
from manyheads.attention import int4_fp8
from manyheads.kernels.int4_fp8 import _e4m3_bits, _rounded, int4_fp8_matmul
from tiers import spread


@pytest.mark.parametrize("table", ["fp8", "exact"])
@pytest.mark.parametrize("scale", [torch.float8_e4m3fn, torch.bfloat16])
@spread(
    ("tokens", "outputs", "width", "group"),
    [(1, 70, 576, 128), (5, 64, 200, 64), (17, 33, 96, 32), (70, 130, 1100, 128)],
    2,
)
def test_reference_torch_and_kernel_agree(tokens, outputs, width, group, scale, table):
    case = build(tokens, outputs, width, group=group, scale=scale, table=table)
    assert worst(case, "torch") <= LIMIT
    assert worst(case, "kernel") <= LIMIT


def test_wrong_variants_fail():
    for name, case in wrong_variants():
        assert worst(case, "kernel") > 20 * LIMIT, name


@triton.jit
def _both(x_ptr, bits_ptr, out_ptr, read_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, _rounded(tl.load(x_ptr + n)))
    tl.store(read_ptr + n, _e4m3_bits(tl.load(bits_ptr + n)).to(tl.float32) * 256.0)


def test_the_rounding_to_e4m3_is_torchs():
    """Every code is read as torch reads it; midpoints, subnormals and what is beside them round as torch rounds."""
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    exact = bits.view(torch.float8_e4m3fn).float()
    bits = bits[exact.isfinite()]
    exact = exact[exact.isfinite()]
    up = exact.abs().unique()
    middles = (up[1:] + up[:-1]) / 2
    x = torch.cat(
        [up, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), torch.rand(500) * 448, torch.rand(500) * 0.02]
    )
    x = torch.cat([x, -x, torch.zeros(8192)])[:4096]
    out, read = torch.empty(4096), torch.empty(4096)
    padded = torch.zeros(4096, dtype=torch.uint8)
    padded[: len(bits)] = bits
    _both[(1,)](x, padded, out, read, N=4096)
    assert torch.equal(out, x.to(torch.float8_e4m3fn).float())
    assert torch.equal(read[: len(bits)], exact)


def test_strangers_are_refused():
    case = build(3, 16, 64, group=32)
    given = [case.x8, case.scale, case.packed.codes, case.packed.scale]
    more = {"group": 32, "factor": 1.0, "dtype": torch.float32}
    wrong = [
        (0, case.x8.float()), (0, case.x8[:, :31]), (1, case.scale[:2]), (2, case.packed.codes[:, :16]),
        (2, case.packed.codes.to(torch.int32)), (3, case.packed.scale.float()), (3, case.packed.scale[:8]),
    ]  # fmt: skip
    for place, value in wrong:
        changed = [value if i == place else x for i, x in enumerate(given)]
        with pytest.raises(UserError, match="int4_fp8_matmul"):
            int4_fp8_matmul(*changed, **more)
    with pytest.raises(UserError, match="int4_fp8_matmul"):
        int4_fp8_matmul(*given, **{**more, "dtype": torch.float64})
    with pytest.raises(UserError, match="do not fit"):
        int4_fp8.multiply(case.x8[:, :8], case.scale, case.packed, torch.float32)


def test_nothing_in_nothing_out():
    case = build(3, 16, 64, group=32)
    assert int4_fp8.multiply(case.x8[:0], case.scale[:0], case.packed, torch.float16, "kernel").shape == (0, 16)
