# SPDX-License-Identifier: Apache-2.0
"""The kernels of product-quantised keys under Triton's interpreter, on the CPU. Collected in a process of its own by
test_interpreter.py.
"""

from dataclasses import replace

import pytest
import torch

from kernels.interpreted import _mended  # noqa: F401 - a fixture that mends the interpreter
from kernels.product_cases import CASES, agrees, build, nearest, wrong_variants
from manyheads import UserError
from manyheads.attention import product_codes as twin
from manyheads.attention.codec import INT4
from manyheads.kernels import product_codes
from tiers import spread


@spread("given", CASES, 5, ids=str)
def test_kernel_twin_and_formula(given):
    case = build(**given)
    assert agrees(case, product_codes)
    assert agrees(case, None)


def test_wrong_variants_fail():
    case = build(count=150, first=[3, 9], batch=2, masked=True)
    for name, wrong in wrong_variants(case).items():
        assert not agrees(case, product_codes, wrong), name


def test_wrong_halves_of_a_byte_fail():
    case = build(count=150, codec=INT4)
    wrong = replace(case, values=(case.values >> 4) | (case.values << 4))
    for fast in (product_codes, None):
        assert agrees(case, fast) and not agrees(case, fast, wrong)


CODED = [(1, 2, 70, 8, 4, 16), (2, 2, 65, 12, 3, 300), (1, 1, 1, 6, 1, 1), (2, 1, 130, 8, 8, 5)]


@pytest.mark.parametrize("shape", CODED, ids=str)
def test_the_nearest_centroid(shape):
    """No other is nearer, by the distances in float64; the twin finds the same, but for what rounding makes equal."""
    batch, heads, count, dim, groups, size = shape
    dtype, shared = (torch.float32, batch == 1) if size > 5 else (torch.bfloat16, True)
    made = torch.Generator().manual_seed(count)
    k = torch.randn(batch, heads, count, dim, generator=made).to(dtype)
    books = torch.randn(1 if shared else batch, heads, groups, size, dim // groups, generator=made).to(dtype)
    kind = twin.code_dtype(size)
    codes = product_codes.encode(k, books, kind)
    assert nearest(k, books, codes)
    assert float((codes == twin.encode(k, books)).double().mean()) > 0.999
    assert size == 1 or not nearest(k, books, product_codes.encode(k, books.roll(1, 3), kind))


def test_strangers_are_refused():
    case = build(count=20)
    with pytest.raises(UserError, match="table_logits"):
        product_codes.table_logits(case.table, case.codes.int(), 20)
    with pytest.raises(UserError, match="table_logits"):
        product_codes.table_logits(case.table, case.codes, 50)
    with pytest.raises(UserError, match="encode"):
        product_codes.encode(torch.zeros(1, 2, 3, 10), case.centroids, torch.uint8)
    x = torch.zeros(1, 4, 20)
    with pytest.raises(UserError, match="fetch"):
        product_codes.fetch(x, x[..., 0], x[..., 0], case.values[:10])
