# SPDX-License-Identifier: Apache-2.0
"""INT4 and FP8 vectors against exact arithmetic: every byte, every code, bounds of the error, and broken numbers."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads import UserError
from manyheads.attention.codec import FP8, INT4, kv_codec, pack, unpack

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CODECS = [INT4, FP8]


def by_name(value):
    return getattr(value, "name", None)


def vectors(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(c, x, dtype=torch.float64):
    return c.decode(*c.encode(x), dtype)


def test_every_byte_survives():
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack(unpack(every)), every)
    assert unpack(every).tolist() == [[byte % 16, byte // 16] for byte in range(256)]
    assert not torch.equal(pack(unpack(every).flip(-1)), every)  # the order of nibbles matters
    assert INT4.decode(every, torch.ones(256).bfloat16(), torch.float32).tolist() == [
        [byte % 16 - 8, byte // 16 - 8] for byte in range(256)
    ]


def test_layout_of_int4():
    """Byte j: channel j in the low nibble, channel j + d / 2 in the high one, code + 8."""
    x = torch.tensor([7.0, -7, 3, 0, 1, 2, -4, 5])
    codes, scale = INT4.encode(x)
    assert scale.dtype == torch.bfloat16 and scale.shape == () and float(scale) == 1
    assert codes.dtype == torch.uint8 and codes.tolist() == [15 + 16 * 9, 1 + 16 * 10, 11 + 16 * 4, 8 + 16 * 13]
    assert torch.equal(INT4.decode(codes, scale, torch.float32), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", CODECS, ids=by_name)
@pytest.mark.parametrize("shape", [(2,), (5, 8), (2, 3, 4, 32), (0, 6), (1, 2, 0, 64)])
def test_shapes_and_dtypes(c, shape, dtype):
    codes, scale = c.encode(vectors(*shape, dtype=dtype))
    assert codes.shape == (*shape[:-1], shape[-1] // 2 if c is INT4 else shape[-1]) and scale.shape == shape[:-1]
    assert codes.dtype == (torch.uint8 if c is INT4 else torch.float8_e4m3fn) and scale.dtype == torch.bfloat16
    assert codes.element_size() == 1
    got = c.decode(codes, scale, dtype)
    assert got.shape == shape and got.dtype == dtype


def bound(c, x, scale):
    """Largest error that the format allows at ``x``."""
    if c is INT4:
        return (scale / 2).expand(x.shape)
    exponent = torch.frexp((x / scale).abs()).exponent - 1
    return scale * 2.0 ** (exponent.clamp(-6, 8) - 4)  # half a step of 3 mantissa bits, or of the subnormals


@pytest.mark.parametrize("c", CODECS, ids=by_name)
@given(seed=st.integers(0, 10_000), power=st.integers(-60, 60), half=st.integers(1, 32))
def test_error_is_at_most_half_a_step(c, seed, power, half):
    x = vectors(4, 2 * half, seed=seed).double() * 2.0**power
    codes, scale = c.encode(x)
    allowed = bound(c, x.float().double(), scale.double()[:, None]) * (1 + 1e-6)
    error = (c.decode(codes, scale, torch.float64) - x).abs()
    assert bool((error <= allowed).all())
    if c is FP8:
        assert bool((error <= torch.maximum(x.abs() / 16, scale[:, None] / 1024)).all())


@pytest.mark.parametrize("c", CODECS, ids=by_name)
def test_control_of_the_bound(c):
    """Codes made with the unrounded scale but read with the rounded one are out of bounds."""
    x = vectors(1000, 64)
    exact = x.abs().amax(-1, keepdim=True) / (7 if c is INT4 else 448)
    rounded = exact.bfloat16().double()
    codes = (x / exact).round().double() if c is INT4 else (x / exact).to(torch.float8_e4m3fn).double()
    assert not bool(((codes * rounded - x).abs() <= bound(c, x.double(), rounded) * (1 + 1e-6)).all())


def test_int4_is_the_nearest_code_in_exact_arithmetic():
    x = vectors(40, 16, seed=3)
    codes, scale = INT4.encode(x)
    top = x.abs().amax(-1)
    for row, s, t, packed in zip(x.tolist(), scale.tolist(), top, unpack(codes).tolist(), strict=True):
        assert s == float((t / 7).bfloat16())
        for value, nibble in zip(row, packed, strict=True):
            code = nibble - 8
            best = min(range(-7, 8), key=lambda n: abs(Fraction(n) * Fraction(s) - Fraction(value)))
            assert code == best


def test_int4_uses_its_whole_range_and_no_more():
    codes = unpack(INT4.encode(vectors(4000, 32))[0]).long() - 8
    assert codes.min() == -7 and codes.max() == 7  # -8 is never written
    assert bool((codes.abs().amax(-1) == 7).all())  # the largest channel of each vector is code 7


@pytest.mark.parametrize("c", CODECS, ids=by_name)
@given(seed=st.integers(0, 999), power=st.integers(-30, 30))
def test_powers_of_two_move_the_scale_alone(c, seed, power):
    x = vectors(3, 16, seed=seed)
    (codes, scale), (same, moved) = c.encode(x), c.encode(x * 2.0**power)
    assert torch.equal(codes.view(torch.uint8), same.view(torch.uint8))
    assert torch.equal(moved.double(), scale.double() * 2.0**power)


def test_control_of_powers_of_two():
    """Another factor moves codes too, through the rounding of the scale."""
    x = vectors(200, 16)
    assert not torch.equal(INT4.encode(x)[0], INT4.encode(x * 1.003)[0])


@pytest.mark.parametrize("c", CODECS, ids=by_name)
def test_what_was_read_is_written_the_same(c):
    """Reading in float32 and writing again moves nothing; in bfloat16 a scale may move, so history is not rewritten."""
    codes, scale = c.encode(vectors(2000, 32))
    again, same = c.encode(c.decode(codes, scale, torch.float32))
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8)) and torch.equal(scale, same)
    assert not torch.equal(c.encode(c.decode(codes, scale, torch.bfloat16))[1], scale)


@pytest.mark.parametrize("c", CODECS, ids=by_name)
def test_zeros_and_the_very_small_and_large(c):
    x = torch.tensor([[0.0, 0, 0, 0], [1e-45, 0, -1e-45, 0], [3e38, -3e38, 1, 0], [1e-30, -1e-30, 5e-31, 0]])
    codes, scale = c.encode(x)
    got = c.decode(codes, scale, torch.float64)
    assert torch.equal(got[:2], torch.zeros(2, 4, dtype=torch.float64)) and not bool((scale == 0).any())
    allowed = bound(c, x.double(), scale.double()[:, None]) * (1 + 1e-6)
    assert bool(((got - x.double()).abs() <= allowed).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("c", CODECS, ids=by_name)
def test_what_is_not_finite_stays_in_its_vector(c, value):
    x = vectors(3, 8)
    want = decoded(c, x)
    x[1, 5] = value
    got = decoded(c, x)
    assert not bool(torch.isfinite(got[1]).any())
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("c", CODECS, ids=by_name)
def test_vectors_do_not_see_each_other(c):
    x = vectors(2, 3, 7, 16, dtype=torch.bfloat16)
    codes, scale = c.encode(x)
    one, own = c.encode(x[1, 2, 4])
    assert torch.equal(codes[1, 2, 4].view(torch.uint8), one.view(torch.uint8)) and scale[1, 2, 4] == own
    strided = x.transpose(1, 2)
    assert torch.equal(c.encode(strided)[0].view(torch.uint8), codes.transpose(1, 2).view(torch.uint8))


@pytest.mark.parametrize("c", CODECS, ids=by_name)
def test_compiles_into_one_graph(c):
    def there_and_back(x):
        return c.decode(*c.encode(x), x.dtype)

    x = vectors(4, 16)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))


def test_names():
    assert copy.deepcopy(INT4) == INT4 != FP8
    named = {name: (kv_codec(name).keys, kv_codec(name).values) for name in ("int4", "k8v4", "fp8")}
    assert named == {"int4": (INT4, INT4), "k8v4": (FP8, INT4), "fp8": (FP8, FP8)}
    assert copy.deepcopy(kv_codec("k8v4")) == kv_codec("k8v4")
    with pytest.raises(UserError, match="int4, k8v4 and fp8"):
        kv_codec("int3")


def test_odd_vectors_are_refused_by_int4_alone():
    with pytest.raises(UserError, match="5 channels"):
        INT4.encode(vectors(2, 5))
    assert decoded(FP8, vectors(2, 5)).shape == (2, 5)
