# SPDX-License-Identifier: Apache-2.0
"""Product-quantised keys: what the kernels' twin makes of them, and the kernels on a GPU.

The kernels without one: interpreted_product_codes.py.
"""

import pytest
import torch

from kernels.product_cases import CASES, agrees, build, moved, nearest, wrong_variants
from manyheads import kernels
from manyheads.attention import product_codes


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_twin(given):
    assert agrees(build(**given), None)


@pytest.mark.gpu
@pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton")
def test_on_a_gpu():
    """Every case by the kernels, none of the wrong ones; and codes, as many as a chunk of a long prompt has."""
    from manyheads.kernels import product_codes as fast

    for given in CASES:
        assert agrees(moved(build(**given), "cuda"), fast), given
    case = moved(build(count=150, first=[3, 9], batch=2, masked=True), "cuda")
    for name, wrong in wrong_variants(case).items():
        assert not agrees(case, fast, wrong), name
    for dtype in (torch.float32, torch.bfloat16):
        k, books = torch.randn(1, 2, 3000, 128, device="cuda"), torch.randn(1, 2, 32, 256, 4, device="cuda")
        k, books = k.to(dtype), books.to(dtype)
        assert nearest(k, books, product_codes.encode(k, books))
        assert not nearest(k, books, product_codes.encode(k, books.roll(1, 3)))
