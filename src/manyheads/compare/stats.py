# SPDX-License-Identifier: Apache-2.0
"""Intervals of 95 % for small samples of contexts. Contexts are the unit: answers within one hang together.

- A share of right answers: Wilson's score interval. With several questions to a context, at the effective sample
  size n / deff, deff the ratio of the variance between contexts to the binomial one (Kish); where all answers agree
  it cannot be estimated and every context counts once.
- The difference of two shares on the same questions: Newcombe's square-and-add of the two Wilson intervals with their
  correlation (Statistics in Medicine 17, 1998, method 10); unlike a bootstrap it has a width where all answers agree.
- A mean over trainings and contexts: :func:`crossed`.
- A mean, and the mean of a paired difference: percentile bootstrap over contexts, stretched about the mean by what the
  bootstrap lacks with few of them: sqrt(g / (g - 1)) for its too small variance, and Student's t over the normal
  quantile (Hesterberg, The American Statistician 69, 2015, section 4).
"""

import math
import zlib
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

__all__ = ["Estimate", "crossed", "mean", "newcombe", "share", "share_difference", "spread", "t_quantile", "wilson"]

Array = np.ndarray[Any, np.dtype[np.float64]]
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure: its value, a 95 % interval, the number of samples and of the independent contexts they come from."""

    value: float
    low: float
    high: float
    n: int
    contexts: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share; ``right`` and ``n`` may be fractions of samples."""
    p, z2 = right / n, _Z * _Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(max(0.0, p * (1 - p) / n) + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe(p1: float, p2: float, both: float, n: float) -> tuple[float, float]:
    """Interval of ``p1 - p2``, two shares of the same ``n`` questions of which the share ``both`` is right in both."""
    (low1, high1), (low2, high2) = wilson(p1 * n, n), wilson(p2 * n, n)
    product = p1 * (1 - p1) * p2 * (1 - p2)
    covariance = both - p1 * p2
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * n))  # his correction for continuity
    phi = covariance / math.sqrt(product) if product > 0 else 0.0
    difference = p1 - p2

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * phi * a * b))

    return difference - reach(p1 - low1, high2 - p2), difference + reach(high1 - p1, p2 - low2)


def share(values: Array, contexts: Array) -> Estimate:
    """Share of right answers (``values`` 0 or 1) with ``contexts`` naming the context of each."""
    n = len(values)
    groups = np.unique(contexts)
    low, high = wilson(values.mean() * _effective(values, contexts), _effective(values, contexts))
    return Estimate(float(values.mean()), low, high, n, len(groups))


def share_difference(values: Array, other: Array, contexts: Array) -> Estimate:
    """Difference of two shares of right answers to the same questions, ``values - other``."""
    n = min(_effective(x, contexts) for x in (values, other))
    low, high = newcombe(float(values.mean()), float(other.mean()), float((values * other).mean()), n)
    return Estimate(float((values - other).mean()), low, high, len(values), len(np.unique(contexts)))


def _effective(values: Array, contexts: Array) -> float:
    """Number of independent answers that ``values`` are worth: between the number of contexts and that of answers."""
    names, member = np.unique(contexts, return_inverse=True)
    n, groups, p = len(values), len(names), float(values.mean())
    if groups == n:
        return float(n)
    if groups == 1 or p in (0.0, 1.0):
        return float(groups)
    residual = np.bincount(member, values - p)
    variance = groups / (groups - 1) * float((residual**2).sum()) / n**2
    effective = p * (1 - p) / variance if variance > 0 else float(n)
    return min(float(n), max(float(groups), effective))


def mean(values: Array, contexts: Array, seed: int, name: str, draws: int = 4000) -> Estimate:
    """Mean of ``values`` with a bootstrap over contexts. ``seed`` and ``name`` fix the draws.

    With one context there is no interval: it is unbounded.
    """
    names, member = np.unique(contexts, return_inverse=True)
    groups, value = len(names), float(values.mean())
    if groups == 1:
        return Estimate(value, -math.inf, math.inf, len(values), 1)
    totals, counts = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    picked = rng.integers(0, groups, (draws, groups))
    means = totals[picked].sum(1) / counts[picked].sum(1)
    stretch = math.sqrt(groups / (groups - 1)) * t_quantile(0.975, groups - 1) / _Z
    low, high = value + stretch * (np.quantile(means, [0.025, 0.975]) - value)
    return Estimate(value, float(low), float(high), len(values), groups)


def crossed(values: Array, seed: int, name: str) -> Estimate:
    """Mean of ``values [S, C]``: S trainings, all judged on the same C contexts; both are drawn from something.

    The reaches of the bootstrap over trainings and of that over contexts, squared and added: a little too wide rather
    than too narrow. With one training the interval is over contexts only.
    """
    value = float(values.mean())
    parts = [mean(values.mean(axis), np.arange(values.shape[1 - axis]), seed, name) for axis in (0, 1)]
    parts = [part for part in parts if math.isfinite(part.low)]
    if not parts:
        return Estimate(value, -math.inf, math.inf, values.size, 1)
    low, high = (math.sqrt(sum((getattr(part, side) - value) ** 2 for part in parts)) for side in ("low", "high"))
    return Estimate(value, value - low, value + high, values.size, values.shape[0])


def spread(values: Array) -> Estimate:
    """Median with its quartiles as the interval: for timings, which are no sample of anything independent."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Estimate(float(middle), float(low), float(high), len(values), len(values))


@cache
def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t for ``p`` > 0.5, by bisection on the integral of its density."""

    def below(t: float) -> float:
        # With x = sqrt(f) tan(a) the density becomes a power of the cosine, smooth on a finite interval.
        angle = np.linspace(0.0, math.atan(t / math.sqrt(freedom)), 2001)
        factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
        return 0.5 + factor * float(np.trapezoid(np.cos(angle) ** (freedom - 1), angle))

    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return (low + high) / 2
