# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the test suite, in one place: twice the expected error. A wrong variant errs by three times that.

Floating point. Errors are relative: RMS of the difference over RMS of the truth. A rounding errs by ``eps / sqrt(12)``
(RMS of what is uniform over a unit in the last place). The error of one step does not know that of the next, so
``steps`` in a row err by ``sqrt(steps)`` times that; two computations of the same numbers differ by ``sqrt(2)`` times
that (:func:`rounding`). A sum of ``n`` terms in 16 lanes, which are then added in pairs, rounds ``n / 16 + 4`` times in
a row. What is computed in a dtype below float32 is compared with float64 beside plain torch in the same dtype
(:data:`HALF_FACTOR`).

Chance. What is drawn at random is compared with its distribution at twice the error that chance alone is expected to
make (:data:`DRAWN`), and each such test has a wrong variant that errs by three times it (:data:`WRONG`) or more.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

PASSES, WRONG = 2.0, 3.0  # times the expected error: what passes at most, what a wrong variant has at least
DRAWN = PASSES  # for what is drawn at random

# Roundings in a row.
CALL = 32  # a call of attention, or a formula of a few sums of up to 64 terms: 8 each, and some for scale and softmax
LAYER = CALL + 4 * 8  # attention with its four projections
MODEL = 512  # a whole tiny model: up to 4 layers of 104 (a call, seven projections and two norms of 8), cross-attention


def rounding(dtype: torch.dtype, steps: int = CALL) -> float:
    """Expected relative RMS difference of two computations of the same numbers that round ``steps`` times in a row."""
    return torch.finfo(dtype).eps * math.sqrt(steps / 6)


def within(dtype: torch.dtype, steps: int = CALL) -> float:
    """Limit of the relative RMS error: what passes."""
    return PASSES * rounding(dtype, steps)


FORMULA = within(torch.float64)  # float64 against the formula: 1e-15
PROJECTED = within(torch.float64, LAYER)  # the same of attention with its projections: 1.5e-15
CLOSE = within(torch.float32)  # float32 against the formula: 5.5e-7
SAME = within(torch.float32, MODEL)  # float32, in another order of summation, through a whole tiny model: 2.2e-6
DEEP = within(torch.float64, MODEL)  # float64 through a whole tiny model: 4.1e-15
GRADIENT = within(torch.float32, 5 * MODEL)  # and back, summed over all tokens: 4.9e-6

HALF = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # kernels, against float64
DEVICE = 2e-5  # kernels on a GPU in float32, whose order of summation and exponential are its own
HALF_FACTOR = PASSES  # times the error of plain torch in the same dtype
BYTES = 0.01  # reported against held


def _tensor(x: Any) -> Tensor:
    return torch.as_tensor(np.asarray(x) if isinstance(x, list | tuple) else x).detach()


def error(got: Any, want: Any, unit: float | None = None) -> float:
    """Relative RMS error of ``got``; infinite where shapes or what is not finite differ (a NaN equals a NaN).

    A number stands for all entries. ``unit`` takes the place of the RMS of ``want`` where that says nothing of the
    roundings: of a difference that cancels, the size of what was subtracted.
    """
    got, want = _tensor(got).double(), _tensor(want).double()
    if want.ndim == 0:
        want = want.expand_as(got)
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(0.0), want[~finite].nan_to_num(0.0)):
        return float("inf")
    got, want = got[finite], want[finite]
    if want.numel() == 0:
        return 0.0
    norm = float(want.pow(2).mean().sqrt()) if unit is None else unit
    return float((got - want).pow(2).mean().sqrt()) / max(norm, 1e-30)


def _limit(*values: Any) -> float:
    """Of a whole tiny model, in the coarser dtype of those; arrays of numpy (tables) hold what was made in float32."""
    exact = all(isinstance(x, Tensor) and x.dtype == torch.float64 for x in values)
    return within(torch.float64 if exact else torch.float32, MODEL)


def assert_close(got: Any, want: Any, limit: float | None = None, unit: float | None = None) -> None:
    """At most ``limit``; without one, what a whole tiny model errs by in the coarser of the two dtypes."""
    found, limit = error(got, want, unit), _limit(got, want) if limit is None else limit
    assert found <= limit, f"relative error {found:.3g} above {limit:.2g}"


def is_close(got: Any, want: Any, limit: float | None = None, unit: float | None = None) -> bool:
    return error(got, want, unit) <= (_limit(got, want) if limit is None else limit)


def is_far(got: Any, want: Any, limit: float | None = None, unit: float | None = None) -> bool:
    """For controls: whether the error is three times the expected one or more, where ``limit`` is twice it."""
    assert _tensor(want).ndim == 0 or _tensor(got).shape == _tensor(want).shape, "of unequal shapes nothing is said"
    return error(got, want, unit) >= WRONG / PASSES * (_limit(got, want) if limit is None else limit)


def nearly(want: Any, dtype: torch.dtype = torch.float64, steps: int = CALL) -> Any:
    """Figures: :func:`within` of the largest of ``want`` (a number, a sequence, a mapping), for ``==``."""
    numbers = want.values() if isinstance(want, Mapping) else np.ravel(want)
    sizes = [abs(float(x)) for x in numbers if math.isfinite(float(x))]
    return pytest.approx(want, rel=0, abs=within(dtype, steps) * (max(sizes, default=0.0) or 1.0))


def conditioned(function: Callable[..., Tensor], *inputs: Tensor) -> float:
    """How many times the relative error of ``inputs`` that of the output is: 1, or more where numbers cancel."""
    noise = torch.Generator().manual_seed(0)
    moved = [x + 1e-7 * x.pow(2).mean().sqrt() * torch.randn(x.shape, generator=noise, dtype=x.dtype) for x in inputs]
    return max(1.0, error(function(*moved), function(*inputs)) / 1e-7)


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


def spread_error(found: float, deviation: float, draws: int, kurtosis: float = 3.0) -> float:
    """Distance of a standard deviation of so many draws from ``deviation``, in its standard errors (large numbers).

    ``kurtosis`` of what is drawn: 3 for a normal, 1.8 for a uniform distribution.
    """
    return abs(found / deviation - 1) * math.sqrt(4 * draws / (kurtosis - 1))
