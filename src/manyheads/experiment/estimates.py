# SPDX-License-Identifier: Apache-2.0
"""From rows to a value with a 95 % interval, and how the interval was made. No other file makes one.

Contexts are independent, the samples within one are not; two trainings of different seeds are, and both axes count
where every seed is judged on the same contexts.

- ``share``, values 0 or 1: Wilson's score interval at the effective sample size n / deff, deff the ratio of the
  variance between contexts to the binomial one (Kish); where all answers agree it cannot be estimated and every
  context counts once. Values between 0 and 1, and several seeds: the same at the n whose binomial variance is that of
  the mean. It never leaves [0, 1].
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
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import UserError
from .rows import Metric, Row

__all__ = ["Estimate", "difference", "estimate", "newcombe", "ratio", "t_quantile", "wilson"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Members = np.ndarray[Any, np.dtype[np.int64]]
_Z = NormalDist().inv_cdf(0.975)
_DRAWS = 4000
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
    """

    value: float
    low: float
    high: float
    n: int
    groups: int
    interval: str

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
        return Estimate(self.value * factor, low, high, self.n, self.groups, self.interval)


def estimate(rows: Sequence[Row], metric: Metric, seed: int = 0) -> Estimate:
    """What ``rows`` of one metric and arm say of it.

    Args:
        rows: at least one.
        metric: how to read them.
        seed: of the bootstrap.
    """
    table = _Table(rows)
    if metric.kind == "time":
        low, middle, high = np.quantile(table.values, [0.25, 0.5, 0.75])
        return Estimate(float(middle), float(low), float(high), len(rows), len(rows), QUARTILES)
    if metric.kind == "share":
        return _share(table)
    return _mean(table, table.values, f"{seed}/{rows[0].arm}/{metric.name}")


def difference(
    rows: Sequence[Row], other: Sequence[Row], metric: Metric, seed: int = 0, factor: float = 1.0,
    ignoring: frozenset[str] = frozenset(),
) -> Estimate:  # fmt: skip
    """``rows - factor * other``, paired by sample, seed and conditions.

    Args:
        rows, other: of one metric, each of one arm.
        metric: how to read them.
        seed: of the bootstrap.
        factor: on the other arm's values.
        ignoring: conditions that differ between the two on purpose, such as ``length``.

    Raises:
        UserError: a sample of ``rows`` has no partner.
    """
    mine, beside = _paired(rows, other, ignoring)
    table = _Table(rows)
    if metric.kind == "share" and factor == 1 and set(mine) | set(beside) <= {0.0, 1.0} and not table.crossed:
        n = min(_effective(_Table(rows, values)) for values in (mine, beside))
        low, high = newcombe(float(mine.mean()), float(beside.mean()), float((mine * beside).mean()), n)
        return Estimate(float((mine - beside).mean()), low, high, len(mine), table.groups, NEWCOMBE)
    name = f"{seed}/{rows[0].arm}/{other[0].arm}/{metric.name}"
    found = _mean(table, mine - factor * beside, name)
    if metric.kind == "time":
        return Estimate(found.value, found.low, found.high, found.n, found.groups, REPEATS)
    return found


def ratio(
    rows: Sequence[Row], other: Sequence[Row], metric: Metric, seed: int = 0, ignoring: frozenset[str] = frozenset()
) -> Estimate:
    """Geometric mean of ``rows / other``, paired as in :func:`difference`; values are positive."""
    mine, beside = _paired(rows, other, ignoring)
    if not ((mine > 0).all() and (beside > 0).all()):
        raise UserError(f"a ratio of {metric.name} needs positive values")
    name = f"{seed}/{rows[0].arm}/{other[0].arm}/{metric.name}/ratio"
    found = _mean(_Table(rows), np.log(mine) - np.log(beside), name)
    kind = REPEATS if metric.kind == "time" else found.interval
    return Estimate(math.exp(found.value), math.exp(found.low), _exp(found.high), found.n, found.groups, kind)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


class _Table:
    """Values of rows with the numbers of their contexts and seeds."""

    def __init__(self, rows: Sequence[Row], values: Array | None = None) -> None:
        if not rows:
            raise ValueError("an estimate needs rows")
        self.values = np.array([row.value for row in rows], np.float64) if values is None else values
        seeds, contexts = [row.seed for row in rows], [row.context for row in rows]
        # The same context under several seeds: seeds and contexts are two axes. Otherwise a context is one of its seed.
        self.crossed = len(set(seeds)) > 1 and len(set(zip(seeds, contexts, strict=True))) > len(set(contexts))
        names = contexts if self.crossed else [f"{s}/{c}" for s, c in zip(seeds, contexts, strict=True)]
        self.context: Members = np.unique(names, return_inverse=True)[1]
        self.seed: Members = np.unique(seeds, return_inverse=True)[1]

    @property
    def axes(self) -> list[tuple[str, Members]]:
        """The axes that intervals count, each with what every row belongs to."""
        if not self.crossed:
            return [(CONTEXTS, self.context)]
        return [(SEEDS, self.seed), (CONTEXTS, self.context)]

    @property
    def groups(self) -> int:
        """Independent groups: of the axis that has fewer."""
        return min((int(member.max()) + 1 for _, member in self.axes if member.max() > 0), default=1)


def _mean(table: _Table, values: Array, name: str) -> Estimate:
    value = float(values.mean())
    reach = [0.0, 0.0]
    counted: list[tuple[str, int]] = []
    for kind, member in table.axes:
        groups = int(member.max()) + 1
        if groups == 1:
            continue
        low, high = _bootstrap(values, member, groups, value, f"{name}/{kind}")
        reach = [reach[0] + (value - low) ** 2, reach[1] + (high - value) ** 2]
        counted.append((kind, groups))
    if not counted:
        return Estimate(value, -math.inf, math.inf, len(values), 1, NONE)
    kind = BOTH if len(counted) == 2 else counted[0][0]
    groups = min(groups for _, groups in counted)
    return Estimate(value, value - math.sqrt(reach[0]), value + math.sqrt(reach[1]), len(values), groups, kind)


def _bootstrap(values: Array, member: Members, groups: int, value: float, name: str) -> tuple[float, float]:
    totals, counts = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    picked = rng.integers(0, groups, (_DRAWS, groups))
    means = totals[picked].sum(1) / counts[picked].sum(1)
    stretch = math.sqrt(groups / (groups - 1)) * t_quantile(0.975, groups - 1) / _Z
    low, high = value + stretch * (np.quantile(means, [0.025, 0.975]) - value)
    return float(low), float(high)


def _share(table: _Table) -> Estimate:
    if table.values.min() < 0 or table.values.max() > 1:
        raise ValueError("a share lies between 0 and 1")
    n, value = _effective(table), float(table.values.mean())
    low, high = wilson(value * n, n)
    return Estimate(value, low, high, len(table.values), table.groups, WILSON)


def _effective(table: _Table) -> float:
    """Number of independent answers that the values are worth: from the number of groups to that of answers."""
    values, p = table.values, float(table.values.mean())
    groups, n = table.groups, len(table.values)
    if groups == n and not table.crossed and set(values) <= {0.0, 1.0}:
        return float(n)
    if groups == 1 or p in (0.0, 1.0):
        return float(groups)
    variance = 0.0
    for _, member in table.axes:
        count = int(member.max()) + 1
        if count > 1:
            residual = np.bincount(member, values - p)
            variance += count / (count - 1) * float((residual**2).sum()) / n**2
    effective = p * (1 - p) / variance if variance > 0 else float(n)
    return min(float(n), effective) if table.crossed else min(float(n), max(float(groups), effective))


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of ``right`` among ``n``, neither need be whole."""
    p, z2 = right / n, _Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def newcombe(p1: float, p2: float, p12: float, n: float) -> tuple[float, float]:
    """95 % interval of ``p1 - p2``, shares of right answers to the same ``n`` questions, ``p12`` that of both right."""
    (low1, high1), (low2, high2) = wilson(p1 * n, n), wilson(p2 * n, n)
    product = p1 * (1 - p1) * p2 * (1 - p2)
    phi = (p12 - p1 * p2) / math.sqrt(product) if product > 0 else 0.0
    gap = p1 - p2

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * phi * a * b))

    return gap - reach(p1 - low1, high2 - p2), gap + reach(high1 - p1, p2 - low2)


def _paired(rows: Sequence[Row], other: Sequence[Row], ignoring: frozenset[str]) -> tuple[Array, Array]:
    def key(row: Row) -> tuple[object, ...]:
        at = tuple(sorted((name, value) for name, value in row.at.items() if name not in ignoring))
        return row.sample, row.seed, at

    partners = {key(row): row.value for row in other}
    if missing := [row for row in rows if key(row) not in partners]:
        raise UserError(
            f"{missing[0].arm} was measured on {missing[0].sample} (seed {missing[0].seed}) and "
            f"{other[0].arm if other else 'the other arm'} was not: finish the run, or compare arms of one run"
        )
    return np.array([row.value for row in rows], np.float64), np.array([partners[key(row)] for row in rows], np.float64)


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
