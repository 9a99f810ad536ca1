# SPDX-License-Identifier: Apache-2.0
"""From rows to a value with a 95 % interval, and how the interval was made. No other file makes one; bounds that a
decision rests on are in :mod:`.risk_bounds`.

Contexts are independent, the samples within one are not. Seeds are independent: where every seed is judged on the same
contexts both axes count; where every seed has contexts of its own they share its training, and the seeds alone count.

- ``share``: Wilson's score interval at the n whose binomial variance is that of the mean, which never leaves [0, 1].
  For answers of 0 and 1 that is n / deff, deff the ratio of the variance between contexts to the binomial one (Kish).
  As the variance is estimated from few groups, n shrinks by (z / t)^2 (Korn and Graubard, Survey Methodology 24, 1998).
  Where all answers agree it cannot be estimated and every group counts once.
- difference of two shares of 0 and 1 on the same samples: Newcombe's square-and-add of the two Wilson intervals with
  their correlation (Statistics in Medicine 17, 1998, method 10); unlike a bootstrap it has a width where all agree.
- ``mean``, and any other paired difference: percentile bootstrap over contexts, stretched about the mean by what the
  bootstrap lacks with few of them: sqrt(g / (g - 1)) for its too small variance, and Student's t over the normal
  quantile (Hesterberg, The American Statistician 69, 2015, section 4). Where several seeds are judged on the same
  contexts, the half-widths over seeds and over contexts, squared and added: a little too wide rather than too narrow.
- ``time``: the median with its quartiles, for repetitions are no sample of anything; the ratio of two arms is that of
  the same repetition, with a bootstrap over repetitions of its logarithm.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import UserError
from .rows import Metric, Row

__all__ = ["Estimate", "difference", "estimate", "newcombe", "paired", "ratio", "t_below", "t_quantile", "wilson"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Members = np.ndarray[Any, np.dtype[np.intp]]  # number of the group that each value belongs to
_Z = NormalDist().inv_cdf(0.975)
_DRAWS = 4000
_AT_ONCE = 1 << 21  # numbers drawn at once: what a bootstrap over many contexts holds
WILSON, NEWCOMBE = "Wilson, by contexts", "Newcombe, paired"
CONTEXTS, SEEDS, BOTH = "bootstrap over contexts", "bootstrap over seeds", "bootstrap over seeds and contexts"
QUARTILES, REPEATS, NONE = "quartiles of repetitions", "bootstrap over repetitions", "one context: no interval"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value, low, high: in the metric's unit; an interval that one context cannot give is infinite.
        n: samples.
        groups: independent ones: contexts, or seeds where those are fewer and both count.
        interval: how it was made.
        error: standard error that the interval was made with (of a ratio: of its logarithm); NaN where there is none.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int
    interval: str
    error: float = field(default=math.nan, compare=False)

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def plain(self) -> dict[str, Any]:
        """The estimate as JSON has it; what is infinite is None."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(self).items()}

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, low, high, self.n, self.groups, self.interval, self.error * abs(factor))


def estimate(rows: Sequence[Row], metric: Metric) -> Estimate:
    """What ``rows`` of one metric and arm say of it.

    Args:
        rows: at least one.
        metric: how to read them.
    """
    table = _Table(rows)
    if metric.kind == "time":
        low, middle, high = np.quantile(table.values, [0.25, 0.5, 0.75])
        return Estimate(float(middle), float(low), float(high), len(rows), len(rows), QUARTILES)
    if metric.kind == "share":
        return _share(table)
    return _mean(table, table.values, f"{rows[0].arm}/{metric.name}")


def difference(
    rows: Sequence[Row], other: Sequence[Row], metric: Metric, factor: float = 1.0,
    ignoring: frozenset[str] = frozenset(),
) -> Estimate:  # fmt: skip
    """``rows - factor * other``, paired by sample, seed and conditions.

    Args:
        rows, other: of one metric, each of one arm.
        metric: how to read them.
        factor: on the other arm's values.
        ignoring: conditions that differ between the two on purpose, such as ``length``.

    Raises:
        UserError: a sample of one arm has no partner in the other, or several.
    """
    mine, beside = _paired(rows, other, ignoring)
    table = _Table(rows)
    if metric.kind == "share" and factor == 1 and set(mine) | set(beside) <= {0.0, 1.0} and not table.crossed:
        n = min(_effective(_Table(rows, values)) for values in (mine, beside))
        low, high = newcombe(float(mine.mean()), float(beside.mean()), float((mine * beside).mean()), n)
        value = float((mine - beside).mean())
        error = max(high - value, value - low) / _Z
        return Estimate(value, low, high, len(mine), table.groups, NEWCOMBE, error)
    found = _mean(table, mine - factor * beside, f"{rows[0].arm}/{other[0].arm}/{metric.name}")
    return replace(found, interval=REPEATS) if metric.kind == "time" and found.bounded else found


def ratio(
    rows: Sequence[Row], other: Sequence[Row], metric: Metric, ignoring: frozenset[str] = frozenset()
) -> Estimate:
    """Geometric mean of ``rows / other``, paired as in :func:`difference`; values are positive."""
    mine, beside = _paired(rows, other, ignoring)
    if not ((mine > 0).all() and (beside > 0).all()):
        raise UserError(f"a ratio of {metric.name} needs positive values")
    name = f"{rows[0].arm}/{other[0].arm}/{metric.name}/ratio"
    found = _mean(_Table(rows), np.log(mine) - np.log(beside), name)
    kind = REPEATS if metric.kind == "time" and found.bounded else found.interval
    low, high = _exp(found.low), _exp(found.high)
    return Estimate(math.exp(found.value), low, high, found.n, found.groups, kind, found.error)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


class _Table:
    """Values of rows with the numbers of their contexts and seeds."""

    def __init__(self, rows: Sequence[Row], values: Array | None = None) -> None:
        if not rows:
            raise ValueError("an estimate needs rows")
        self.values = np.array([row.value for row in rows], np.float64) if values is None else values
        seeds, contexts = [row.seed for row in rows], [row.context for row in rows]
        self.several = len(set(seeds)) > 1
        # The same context under several seeds: seeds and contexts are two axes. Otherwise a context is one of its seed.
        self.crossed = self.several and len(set(zip(seeds, contexts, strict=True))) > len(set(contexts))
        _, self.context = np.unique(contexts, return_inverse=True)
        _, self.seed = np.unique(seeds, return_inverse=True)

    @property
    def axes(self) -> list[tuple[str, Members]]:
        """The axes that intervals count, each with what every row belongs to."""
        seeds, contexts = (SEEDS, self.seed), (CONTEXTS, self.context)
        if self.crossed:
            return [seeds, contexts]
        return [seeds if self.several else contexts]

    @property
    def groups(self) -> int:
        """Independent groups: of the axis that has fewer."""
        return min((int(member.max()) + 1 for _, member in self.axes if member.max() > 0), default=1)


def _mean(table: _Table, values: Array, name: str) -> Estimate:
    value = float(values.mean())
    reach, variance = [0.0, 0.0], 0.0
    counted: list[tuple[str, int]] = []
    for kind, member in table.axes:
        groups = int(member.max()) + 1
        if groups == 1:
            continue
        low, high, error = _bootstrap(values, member, groups, value, f"{name}/{kind}")
        variance += error**2
        reach = [reach[0] + (value - low) ** 2, reach[1] + (high - value) ** 2]
        counted.append((kind, groups))
    if not counted:
        return Estimate(value, -math.inf, math.inf, len(values), 1, NONE)
    kind = BOTH if len(counted) == 2 else counted[0][0]
    groups = min(groups for _, groups in counted)
    low, high = value - math.sqrt(reach[0]), value + math.sqrt(reach[1])
    return Estimate(value, low, high, len(values), groups, kind, math.sqrt(variance))


def _bootstrap(values: Array, member: Members, groups: int, value: float, name: str) -> tuple[float, float, float]:
    """Bounds of the mean, and its standard error."""
    totals, counts = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng(zlib.crc32(f"0/{name}".encode()))  # 0: the draws of all results that are stored
    means = np.empty(_DRAWS)
    step = max(1, _AT_ONCE // groups)
    for first in range(0, _DRAWS, step):
        picked = rng.integers(0, groups, (min(step, _DRAWS - first), groups))
        means[first : first + step] = totals[picked].sum(1) / counts[picked].sum(1)
    few = math.sqrt(groups / (groups - 1))
    low, high = value + few * t_quantile(0.975, groups - 1) / _Z * (np.quantile(means, [0.025, 0.975]) - value)
    return float(low), float(high), few * float(means.std())


def _share(table: _Table) -> Estimate:
    if table.values.min() < 0 or table.values.max() > 1:
        raise ValueError("a share lies between 0 and 1")
    n, value = _effective(table), float(table.values.mean())
    low, high = wilson(value * n, n)
    error = max(high - value, value - low) / _Z
    return Estimate(value, low, high, len(table.values), table.groups, WILSON, error)


def _effective(table: _Table) -> float:
    """Number of independent answers of 0 or 1 that would tell as much of the mean as the values do."""
    values, p = table.values, float(table.values.mean())
    n, binary = len(table.values), set(table.values) <= {0.0, 1.0}
    variance = crowding = 0.0
    for _, member in table.axes:
        count = int(member.max()) + 1
        if count > 1:
            crowding += float((np.bincount(member) ** 2).sum()) / n**2
            residual = np.bincount(member, values - p)
            few = (t_quantile(0.975, count - 1) / _Z) ** 2
            variance += few * count / (count - 1) * float((residual**2).sum()) / n**2
    least = 1 / crowding if crowding else 1.0  # what the values are worth if those of a group are all alike
    if least > n - 0.5 and binary and not table.crossed:
        return float(n)  # every answer stands alone: the binomial distribution itself
    if p in (0.0, 1.0) or not crowding:
        return least
    if variance == 0:
        return float(n) if binary else least
    found = max(least, p * (1 - p) / variance)
    return min(float(n), found) if binary else found


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of ``right`` among ``n``, neither need be whole."""
    p, z2 = right / n, _Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, middle - reach)), min(1.0, max(p, middle + reach))  # rounding may pass p at 0 and 1


def newcombe(p1: float, p2: float, p12: float, n: float) -> tuple[float, float]:
    """95 % interval of ``p1 - p2``, shares of right answers to the same ``n`` questions, ``p12`` that of both right."""
    (low1, high1), (low2, high2) = wilson(p1 * n, n), wilson(p2 * n, n)
    product = p1 * (1 - p1) * p2 * (1 - p2)
    covariance = p12 - p1 * p2
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * n))  # his correction for continuity
    phi = covariance / math.sqrt(product) if product > 0 else 0.0
    gap = p1 - p2

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * phi * a * b))

    return gap - reach(p1 - low1, high2 - p2), gap + reach(high1 - p1, p2 - low2)


def paired(rows: Sequence[Row], other: Sequence[Row]) -> bool:
    """Whether the two arms were measured on the same samples, each once, so that they have a difference."""
    mine, beside = ({_pair(row) for row in some} for some in (rows, other))
    return mine == beside and len(mine) == len(rows) == len(other)


def _pair(row: Row, ignoring: frozenset[str] = frozenset()) -> tuple[object, ...]:
    """What rows of two arms have in common that belong together."""
    at = tuple(sorted((name, value) for name, value in row.at.items() if name not in ignoring))
    return row.sample, row.seed, at


def _paired(rows: Sequence[Row], other: Sequence[Row], ignoring: frozenset[str]) -> tuple[Array, Array]:
    mine, beside = _by_pair(rows, ignoring), _by_pair(other, ignoring)
    for left, right, by in ((rows, other, beside), (other, rows, mine)):
        if missing := [row for row in left if _pair(row, ignoring) not in by]:
            raise UserError(
                f"{missing[0].arm} was measured on {missing[0].sample} (seed {missing[0].seed}) and "
                f"{right[0].arm if right else 'the other arm'} was not: finish the run, or compare arms of one run"
            )
    return (
        np.array([row.value for row in rows], np.float64),
        np.array([beside[_pair(row, ignoring)] for row in rows], np.float64),
    )


def _by_pair(rows: Sequence[Row], ignoring: frozenset[str]) -> dict[tuple[object, ...], float]:
    found = {_pair(row, ignoring): row.value for row in rows}
    if len(found) < len(rows):
        raise UserError(
            f"{rows[0].arm} has several values on one sample under the same conditions: name the conditions to compare"
        )
    return found


def t_below(t: float, freedom: int) -> float:
    """Chance that Student's t is below ``t`` of 0 or more, by an integral of its density."""
    # With x = sqrt(f) tan(a) the density becomes a power of the cosine, smooth on a finite interval.
    angle = np.linspace(0.0, math.atan(t / math.sqrt(freedom)), 2001)
    factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + factor * float(np.trapezoid(np.cos(angle) ** (freedom - 1), angle))


@cache
def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t for ``p`` > 0.5, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, freedom) < p else (low, middle)
    return (low + high) / 2
