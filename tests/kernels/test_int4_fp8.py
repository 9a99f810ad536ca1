# SPDX-License-Identifier: Apache-2.0
"""The product of INT4 weights and FP8 activations on a GPU; under Triton's interpreter: interpreted_int4_fp8.py."""

import pytest
import torch

from kernels.int4_cases import HALF, build, worst, wrong_variants
from manyheads import kernels

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton")]


class TestGPU:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", list(HALF), ids=str)
    @pytest.mark.parametrize("table", ["fp8", "exact"])
    @pytest.mark.parametrize("scale", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("tokens", "outputs", "width", "group"),
        [(1, 4096, 4096, 128), (16, 576, 576, 128), (63, 130, 200, 64), (65, 33, 96, 32), (300, 1536, 576, 128)],
    )
    def test_reference_torch_and_kernel_agree(self, tokens, outputs, width, group, scale, table, dtype):
        case = build(tokens, outputs, width, group=group, scale=scale, table=table, device="cuda")
        # FP8 tensor cores keep about 14 bits of a sum within one group.
        limit = max(HALF[dtype], 2e-4)
        assert worst(case, "kernel", dtype) <= limit
        by_torch = limit if table == "exact" or outputs % 16 else max(limit, HALF[torch.bfloat16])
        assert worst(case, "torch", dtype) <= by_torch  # torch._scaled_mm gives bfloat16

    def test_wrong_variants_fail(self):
        for name, case in wrong_variants("cuda"):
            assert worst(case, "kernel") > 1e-3, name
