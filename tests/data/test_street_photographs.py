# SPDX-License-Identifier: Apache-2.0
"""Photographs of streets: their size and range, which are chosen, and what is said without them."""

import pytest
import torch

from manyheads.data import street_photographs as data

needs_data = pytest.mark.skipif(not data.available(), reason="this file is neither in MANYHEADS_DATA nor in the cache")


@needs_data
def test_photographs():
    few, more = data.photographs(56, 4), data.photographs(56, 8)
    assert few.shape == (4, 3, 56, 56) and few.dtype == torch.float32
    assert float(few.min()) >= 0 and float(few.max()) <= 1 and float(few.std()) > 0.1
    assert torch.equal(few, more[::2])  # spread over all of them, not the first
    assert len(data.photographs(14, 1000)) == 39
