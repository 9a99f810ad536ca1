# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the test suite, in one place. Errors are relative: RMS of the difference over RMS of the truth."""

import torch
from torch import Tensor

FORMULA = 1e-10  # float64 against the formula
SAME = 2e-5  # float32, the same numbers in another order of summation, through a whole tiny model
HALF = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # against float64
HALF_FACTOR = 2.0  # times the error of plain torch in the same dtype
BYTES = 0.01  # reported against held


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
