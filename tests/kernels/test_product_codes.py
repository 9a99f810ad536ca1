# SPDX-License-Identifier: Apache-2.0
"""Product-quantised keys: kernels under the interpreter, and on a GPU with values in page-locked memory."""

import pytest

from kernels.interpreter import needs_triton, run_interpreted
from kernels.product_cases import CASES, agrees, build


@needs_triton
def test_kernels_under_the_interpreter():
    run_interpreted("interpreted_product_codes.py")


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_twin(given):
    assert agrees(build(**given), None)
