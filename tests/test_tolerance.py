# SPDX-License-Identifier: Apache-2.0
"""What the tolerances stand on: what is expected is what is found, and what errs by three times it does not pass."""

import math
import re
from pathlib import Path

import pytest
import torch

from tolerance import (
    CALL,
    CLOSE,
    DRAWN,
    FORMULA,
    MODEL,
    PASSES,
    WRONG,
    error,
    is_close,
    is_far,
    mean_error,
    nearly,
    rounding,
    share_error,
    within,
)

LIMITS = {torch.float64: FORMULA, torch.float32: CLOSE}


def attention(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def call(seed, dtype=torch.float64):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 48, 16, generator=draws, dtype=torch.float64).to(dtype) for _ in range(3)]


def other_order(q, k, v):
    channels, keys = torch.randperm(q.shape[-1]), torch.randperm(k.shape[-2])
    return attention(q[..., channels], k[..., keys, :][..., channels], v[..., keys, :])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_call_in_another_order_errs_as_expected(dtype):
    """The expected error is not far above what is found, or the limit would let wrong numbers pass."""
    found = torch.tensor([error(other_order(*call(seed, dtype)), attention(*call(seed, dtype))) for seed in range(20)])
    assert found.max() <= LIMITS[dtype] and rounding(dtype) / 8 < found.mean() <= rounding(dtype)


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_sums_err_as_their_roundings_say(n):
    x = torch.randn(400, n)
    found, expected = error(x.sum(1), x.double().sum(1)), rounding(torch.float32, n // 16 + 4)
    assert expected / 16 < found <= PASSES * expected


@pytest.mark.parametrize("steps", [CALL, MODEL])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_three_times_the_expected_error_does_not_pass(dtype, steps):
    want, noise = attention(*call(0)), torch.randn(2, 4, 48, 16).double()
    noise *= rounding(dtype, steps) * want.pow(2).mean().sqrt() / noise.pow(2).mean().sqrt()
    limit = within(dtype, steps)
    assert is_close(want + noise, want, limit) and not is_far(want + noise, want, limit)
    wrong = want + 1.01 * WRONG * noise
    assert not is_close(wrong, want, limit) and is_far(wrong, want, limit)
    assert 1 + rounding(dtype, steps) == nearly(1.0, dtype, steps)
    assert 1 + WRONG * rounding(dtype, steps) != nearly(1.0, dtype, steps)
    one = want.clone()
    one[0, 0, 0, 0] += WRONG * rounding(dtype, steps) * float(want.norm())  # in one number of all
    assert not is_close(one, want, limit)


def test_wrong_variants_of_a_call_do_not_pass():
    q, k, v = call(0)
    want = attention(q, k, v)
    rounded = attention(q.float().double(), k, v)
    assert is_close(attention(q, k, v), want, FORMULA) and not is_close(rounded, want, FORMULA)  # float32 on the way
    small = (q @ k.mT * 16**-0.5).exp()
    assert is_close(small / small.sum(-1, keepdim=True) @ v, want, FORMULA)
    assert not is_close(small / (small.sum(-1, keepdim=True) + 1e-12) @ v, want, FORMULA)  # an epsilon in the quotient
    single = attention(*call(0, torch.float32))
    tensor_float = (q.float().view(torch.int32) & ~0x1FFF).view(torch.float32)  # 10 bits of mantissa, as in TF32
    assert is_close(single, want, CLOSE) and not is_close(attention(tensor_float, k.float(), v.float()), single, CLOSE)
    assert not is_close(attention(q.float() * (1 + 3e-6), k.float(), v.float()), want, CLOSE)  # the scale, by 3e-6


def test_what_is_not_finite_has_to_be_alike():
    nan, inf = math.nan, math.inf
    assert error([1.0, nan, inf], [1.0, nan, inf]) == 0 == error([nan], [nan])
    for wrong in ([1.0, nan, -inf], [1.0, 2.0, inf], [1.0, inf, nan], [1.0, nan], [[1.0, nan, inf]]):
        assert error(wrong, [1.0, nan, inf]) == inf
    assert is_close(torch.ones(2, 3), 1) and is_far([1.0, 2.0], 1) and not is_far(torch.ones(2, 3), 1)
    with pytest.raises(AssertionError, match="unequal shapes"):
        is_far([1.0, 2.0], [1.0])
    assert error([3.0, 4.5], [3.0, 4.0]) == nearly(0.5 / 5)
    assert error([1e-16], [0.0]) > 1 > error([1e-16], [0.0], unit=1.0) == nearly(1e-16)


def test_figures_are_compared_at_the_size_of_the_largest():
    assert nearly([1.0, 0.0]) == [1.0, 1e-17] and nearly({"a": 3.0 + 4e-16}) == {"a": 3.0}
    assert nearly([1.0, 0.0]) != [1.0, 1e-9] and nearly({"a": 3.0 + 1e-13}) != {"a": 3.0}
    assert nearly(2e-20) != 1e-20 and nearly(1e-300) != 0.0
    assert nearly(0.3) == 0.1 + 0.2 and 0.1 + 0.2 != 0.3


def test_draws_are_compared_with_what_chance_makes():
    """Off by the error of chance passes, off by three times it does not: a share, and a mean."""
    p, n = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 10_000
    deviation = math.sqrt((1 - float(p.pow(2).sum())) / n) / math.sqrt(2)
    for times, passes in ((1.0, True), (WRONG, False)):
        found = share_error(n * (p + times * deviation * torch.tensor([1.0, -1.0, 0.0]).double()), p)
        assert found == nearly(times, steps=MODEL) and (found < DRAWN) == passes
        found = mean_error(torch.tensor([-1.0, 1.0]).double().repeat(n // 2) + times / math.sqrt(n), 0.0, 1.0)
        assert found == nearly(times, steps=MODEL**2) and (found < DRAWN) == passes


def test_other_ways_of_comparing_are_not_used():
    """Of torch, numpy and unittest: their tolerances know neither how the numbers were made nor what is expected.

    On a GPU the order of summation is the library's own: those tests state theirs.
    """
    other = re.compile(r"\ballclose\(|\bisclose\(.*rtol|testing\.assert_close|assertAlmostEqual|assert_allclose")
    here = Path(__file__).parent
    files = [path for path in here.rglob("*.py") if path != Path(__file__) and not path.stem.endswith("_gpu")]
    lines = [(path, line) for path in files for line in path.read_text().splitlines()]
    assert not [(str(path.relative_to(here)), line) for path, line in lines if other.search(line)]
