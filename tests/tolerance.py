# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the test suite, in one place. Errors are relative: RMS of the difference over RMS of the truth.

What is drawn at random is compared with its distribution at twice the error that chance alone is expected to make
(:data:`DRAWN`), and each such test has a wrong variant that errs by three times it (:data:`WRONG`) or more.
"""

import math

import torch
from torch import Tensor

FORMULA = 1e-10  # float64 against the formula
SAME = 2e-5  # float32, the same numbers in another order of summation, through a whole tiny model
HALF = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # against float64
HALF_FACTOR = 2.0  # times the error of plain torch in the same dtype
BYTES = 0.01  # reported against held
DRAWN, WRONG = 2.0, 3.0  # times the expected error: what passes at most, what a wrong variant has at least


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS error of ``got``; infinite where one is finite and the other is not, or shapes differ."""
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    finite = want.isfinite()
    got, want = got[finite].double(), want[finite].double()
    if want.numel() == 0:
        return 0.0
    norm = want.pow(2).mean().sqrt()
    return float((got - want).pow(2).mean().sqrt() / norm.clamp(min=1e-30))


def assert_close(got: Tensor, want: Tensor, limit: float = SAME) -> None:
    assert error(got, want) <= limit, f"relative error {error(got, want):.3g} above {limit:.1g}"


def share_error(counts: Tensor, p: Tensor) -> float:
    """Distance of the shares ``counts [K]`` from the distribution ``p [K]``, in units of what chance makes it expect.

    The root of the expected squared distance of n draws is ``sqrt((1 - sum p^2) / n)``.
    """
    n, p = float(counts.sum()), p.double()
    expected = math.sqrt(max(0.0, 1 - float(p.pow(2).sum())) / n)
    return float((counts.double() / n - p).norm()) / max(expected, 1e-12)  # what is certain has no error


def mean_error(drawn: Tensor, mean: float, deviation: float) -> float:
    """Distance of the mean of ``drawn`` from ``mean``, in standard errors of draws with that standard deviation."""
    return abs(float(drawn.double().mean()) - mean) / max(deviation / math.sqrt(drawn.numel()), 1e-12)
