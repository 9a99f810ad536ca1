# SPDX-License-Identifier: Apache-2.0
"""Product-quantised keys: what the kernels' twin makes of them; the kernels: interpreted_product_codes.py."""

import pytest

from kernels.product_cases import CASES, agrees, build


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_twin(given):
    assert agrees(build(**given), None)
