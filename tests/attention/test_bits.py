# SPDX-License-Identifier: Apache-2.0
"""Packed signs and their distance against Python's integers, and what the distance estimates."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.attention.bits import hamming, pack_signs


def as_int(packed):
    return int.from_bytes(bytes(packed.tolist()), "little")


@given(bits=st.integers(1, 40), seed=st.integers(0, 99))
def test_pack_and_distance(bits, seed):
    x, y = torch.randn(2, 3, bits, generator=torch.Generator().manual_seed(seed))
    x[0, 0], x[1, 0] = 0.0, -0.0  # zero counts as positive, either way
    a, b = pack_signs(x), pack_signs(y)
    assert a.dtype == torch.uint8 and a.shape == (3, -(-bits // 8))
    for i in range(3):
        assert as_int(a[i]) == sum(1 << j for j in range(bits) if x[i, j] >= 0)
        assert int(hamming(a, b)[i]) == (as_int(a[i]) ^ as_int(b[i])).bit_count()
    assert hamming(a[:, None], b[None]).shape == (3, 3) and bool((hamming(a, a) == 0).all())


def test_every_byte():
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    want = [[(x ^ y).bit_count() for y in range(256)] for x in range(256)]
    assert hamming(every[:, None], every[None]).tolist() == want


def test_distance_estimates_the_angle():
    """Hamming / bits is the angle over pi, off by no more than 4 standard deviations of 0.5 / sqrt(bits) each."""
    x, y, bits = torch.randn(8), torch.randn(8), 20_000
    planes = torch.randn(8, bits)
    for z in (y, x + 0.3 * y, -x + 0.1 * y):
        angle = math.acos(float(torch.cosine_similarity(x, z, 0)))
        got = int(hamming(pack_signs(x @ planes), pack_signs(z @ planes))) / bits
        assert abs(got - angle / math.pi) <= 4 * 0.5 / math.sqrt(bits)
