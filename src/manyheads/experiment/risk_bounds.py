# SPDX-License-Identifier: Apache-2.0
"""Upper bounds of a risk, the mean of a loss in [0, 1], from n independent samples, each with a probability.

Intervals of what a claim measures are made in :mod:`.estimates`; a bound is one-sided, holds at any n, and is what a
decision can rest on. All hold with probability ``1 - delta`` or more over the draw of the samples.

- One rule, chosen beforehand: :func:`hoeffding`, and :func:`clopper_pearson` where the loss is 0 or 1, the tightest.
- A rule that was chosen by the same samples, or a posterior Q over rules: PAC-Bayes with a prior P fixed beforehand,

      kl(r(Q) || R(Q)) <= (KL(Q||P) + ln(2 sqrt(n) / delta)) / n

  (Seeger, JMLR 3, 2002; the constant is Maurer's, arXiv cs/0411099), inverted exactly by :func:`seeger`, or through
  Pinsker's inequality by :func:`mcallester`, which is never lower. One of K rules has KL = ln K under a uniform prior;
  an adapter with Gaussian weights has :func:`gaussian_kl`.
- Uniformly over a class of rules: :func:`rademacher`, with Massart's bound of a finite class by :func:`massart`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError

__all__ = [
    "binary_kl", "binomial_cdf", "clopper_pearson", "gaussian_kl", "hoeffding", "kl_inverse", "massart", "mcallester",
    "rademacher", "seeger",
]  # fmt: skip


def hoeffding(risk: float, n: int, delta: float = 0.05) -> float:
    """``risk + sqrt(ln(1/delta) / 2n)``, at most 1."""
    _check(risk, n, delta)
    return min(1.0, risk + math.sqrt(math.log(1 / delta) / (2 * n)))


def clopper_pearson(errors: int, n: int, delta: float = 0.05) -> tuple[float, float]:
    """Lower and upper bound of a probability that gave ``errors`` in n draws; each holds with ``1 - delta``.

    A two-sided interval of 95 % has ``delta=0.025``.
    """
    _check(errors / max(n, 1), n, delta)
    low = 0.0 if errors == 0 else _bisect(lambda p: 1 - binomial_cdf(errors - 1, n, p) > delta)
    return low, 1.0 if errors == n else _bisect(lambda p: binomial_cdf(errors, n, p) < delta)


def mcallester(risk: float, n: int, kl: float = 0.0, delta: float = 0.05) -> float:
    """PAC-Bayes through Pinsker's inequality, at most 1: ``kl`` is KL(Q||P) in nats."""
    return min(1.0, risk + math.sqrt(_complexity(risk, n, kl, delta) / 2))


def seeger(risk: float, n: int, kl: float = 0.0, delta: float = 0.05) -> float:
    """PAC-Bayes with the kl of two coins inverted: ``kl`` is KL(Q||P) in nats."""
    return kl_inverse(risk, _complexity(risk, n, kl, delta))


def rademacher(risk: float, n: int, complexity: float, delta: float = 0.05) -> float:
    """``risk + 2 complexity + sqrt(ln(1/delta) / 2n)``, at most 1, of any rule of a class of that complexity."""
    return min(1.0, hoeffding(risk, n, delta) + 2 * complexity)


def massart(rules: int, n: int) -> float:
    """Rademacher complexity of a class of so many rules with losses in [0, 1], at most: ``sqrt(2 ln(rules) / n)``."""
    return math.sqrt(2 * math.log(rules) / n)


def gaussian_kl(mean: Any, deviation: Any, prior_deviation: float, prior_mean: Any = 0.0) -> float:
    """KL of independent normal weights from a normal prior, nats: of an adapter's weights, before which it is zero.

    Args:
        mean, deviation: arrays or CPU tensors of any shape, broadcastable.
        prior_deviation, prior_mean: fixed before the samples were seen.

    Raises:
        UserError: a deviation is not above 0.
    """
    mean, deviation = np.broadcast_arrays(np.asarray(mean, float), np.asarray(deviation, float))
    if not ((deviation > 0).all() and prior_deviation > 0):
        raise UserError("a normal posterior and its prior have deviations above 0")
    spread = (deviation**2 + (mean - prior_mean) ** 2) / (2 * prior_deviation**2)
    return float((spread - 0.5 + np.log(prior_deviation / deviation)).sum())


def binomial_cdf(most: int, n: int, p: float) -> float:
    """Chance of at most ``most`` successes in n draws of probability ``p``, 0 < p < 1."""
    k = np.arange(most + 1)
    chosen = np.append(0.0, np.cumsum(np.log(n - k[1:] + 1) - np.log(k[1:])))  # ln of n over k
    return float(np.exp(chosen + k * math.log(p) + (n - k) * math.log1p(-p)).sum())


def binary_kl(q: float, p: float) -> float:
    """KL of a coin that falls with probability ``q`` from one with ``p``, nats; infinite where p excludes q."""
    total = 0.0
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return max(0.0, total)


def kl_inverse(q: float, bound: float) -> float:
    """The largest ``p >= q`` with ``kl(q || p) <= bound``, from above."""
    return _bisect(lambda p: binary_kl(q, p) > bound, q)


def _complexity(risk: float, n: int, kl: float, delta: float) -> float:
    _check(risk, n, delta)
    if not kl >= 0:
        raise UserError(f"a KL divergence is 0 or more, not {kl}")
    return (kl + math.log(2 * math.sqrt(n) / delta)) / n


def _check(risk: float, n: int, delta: float) -> None:
    if not (0 <= risk <= 1 and n >= 1 and 0 < delta < 1):
        raise UserError(f"a bound needs a risk in [0, 1], samples and 0 < delta < 1, not {risk}, {n}, {delta}")


def _bisect(beyond: Callable[[float], bool], low: float = 0.0) -> float:
    """The least p in ``[low, 1]`` at which ``beyond`` is true, from above; 1 where it is nowhere."""
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
