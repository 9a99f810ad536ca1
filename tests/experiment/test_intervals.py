# SPDX-License-Identifier: Apache-2.0
"""Every factor of an interval, recomputed by another route: enumeration, scipy, and the formulas written out."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from manyheads.experiment import estimates
from manyheads.experiment.estimates import Estimate, difference, estimate, newcombe, ratio
from manyheads.experiment.rows import Metric
from oracles.rows import crossed, rows
from tolerance import DRAWN, WRONG, nearly, spread_error

SHARE = Metric("m", "share", higher=True, kind="share")
MEAN = Metric("m", "mean")
TIME = Metric("m", "time", "s", kind="time")


def exact(values):
    """Mean of every resample of ``values``, all equally likely: the bootstrap without chance."""
    return np.array([np.mean(picked) for picked in itertools.product(values, repeat=len(values))])


def test_a_bootstrap_of_few_groups_is_every_resample_stretched_twice(monkeypatch):
    """By Student's t over the normal quantile, and by the root of g / (g - 1); each left out is found out."""
    monkeypatch.setattr(estimates, "_DRAWS", 40_000)
    values = [0.3, 1.1, 1.9, 4.0, 7.5]
    resampled = exact(values)
    t, z, few = scipy_stats.t.ppf(0.975, 4), scipy_stats.norm.ppf(0.975), math.sqrt(5 / 4)
    found = estimate(rows(values), MEAN)
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf") - np.mean(values)
    # Half of the 0.4 % that the 40,000 draws miss a standard deviation by, and steps of the discrete distribution.
    for factor, close in ((few * t / z, True), (t / z, False), (few, False), (1.0, False)):
        want = np.mean(values) + factor * np.array([low, high])
        assert ((found.low, found.high) == pytest.approx(tuple(want), rel=0.02)) == close
    error = math.sqrt(5) * found.error
    assert spread_error(error, np.std(values, ddof=1), 40_000) < DRAWN
    assert spread_error(error, np.std(values), 40_000) > WRONG


def test_groups_of_unequal_size_are_resampled_whole(monkeypatch):
    monkeypatch.setattr(estimates, "_DRAWS", 40_000)
    groups = [[0.0, 1.0, 2.0], [5.0], [1.0, 1.0], [8.0, 4.0]]
    values, members = np.concatenate(groups), np.repeat(np.arange(4), [len(g) for g in groups])
    means = [np.mean(np.concatenate(picked)) for picked in itertools.product(groups, repeat=4)]
    found = estimate(rows(values, members), MEAN)
    assert found.value == nearly(values.mean()) and found.groups == 4 and found.n == 8
    kurtosis = float(scipy_stats.kurtosis(means, fisher=False))
    assert spread_error(found.error, math.sqrt(4 / 3) * np.std(means), 40_000, kurtosis) < DRAWN
    assert spread_error(found.error, np.std(means), 40_000, kurtosis) > WRONG
    alone = estimate(rows(values), MEAN)
    assert alone.groups == 8 and alone.error != pytest.approx(found.error, rel=0.1)


def test_seeds_and_contexts_add_their_squares():
    values = np.random.default_rng(2).normal(size=(4, 1)) + np.random.default_rng(3).normal(size=(4, 7)) * 2
    both = estimate(crossed(values), MEAN)
    # An axis alone: one row for each seed, or for each context, under the same name, so that the draws are the same.
    seeds = estimate(rows(values.mean(1), seeds=range(4)), MEAN)
    contexts = estimate(rows(values.mean(0)), MEAN)
    assert (seeds.interval, contexts.interval) == (estimates.SEEDS, estimates.CONTEXTS)
    assert (both.interval, both.groups, both.n) == (estimates.BOTH, 4, 28)
    assert both.value - both.low == nearly(math.hypot(seeds.value - seeds.low, contexts.value - contexts.low))
    assert both.high - both.value == nearly(math.hypot(seeds.high - seeds.value, contexts.high - contexts.value))
    assert both.error == nearly(math.hypot(seeds.error, contexts.error))


def effective(values, *axes):
    """Number of independent answers worth as much, from the variance of a mean of clusters, written out."""
    n, p, variance = len(values), np.mean(values), 0.0
    for members in axes:
        groups = sorted(set(members))
        totals = [sum(v - p for v, m in zip(values, members, strict=True) if m == g) for g in groups]
        linear = len(groups) / (len(groups) - 1) * sum(total**2 for total in totals) / n**2
        variance += linear * (scipy_stats.t.ppf(0.975, len(groups) - 1) / scipy_stats.norm.ppf(0.975)) ** 2
    return p * (1 - p) / variance


def scipys_wilson(p, n):
    """Wilson's interval as the roots of his quadratic equation."""
    z = scipy_stats.norm.ppf(0.975)
    return tuple(sorted(np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]).real))


def test_a_share_of_clusters_has_the_n_of_its_variance():
    """Kish's design effect with Korn and Graubard's factor for few groups, of clusters of unequal size."""
    values = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0], float)
    members = [0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7, 7]
    found = estimate(rows(values, members), SHARE)
    n = effective(values, members)
    assert 8 < n < 9 and (found.low, found.high) == pytest.approx(scipys_wilson(values.mean(), n), rel=1e-4)
    assert (found.n, found.groups, found.interval) == (16, 8, estimates.WILSON)
    assert found.error == pytest.approx(max(found.high - found.value, found.value - found.low) / 1.959964, rel=1e-6)
    fractions = np.array([0.4, 0.5, 0.7, 0.55, 0.45, 0.6, 0.5])
    n = effective(fractions, range(7))
    found = estimate(rows(fractions), SHARE)
    assert n > 7 and (found.low, found.high) == pytest.approx(scipys_wilson(fractions.mean(), n), rel=1e-4)


def test_a_share_over_seeds_and_contexts_adds_their_variances():
    answers = np.array([[1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1]], float)
    found = estimate(crossed(answers), SHARE)
    n = effective(answers.ravel(), np.repeat(range(4), 6), np.tile(range(6), 4))
    least = 1 / (4 * 36 / 576 + 6 * 16 / 576)  # as few as if every seed and context answered as one
    assert (found.low, found.high) == pytest.approx(scipys_wilson(answers.mean(), max(n, least)), rel=1e-4)


def test_a_share_is_worth_at_most_its_answers_and_at_least_its_groups():
    spread = estimate(rows([1, 0] * 10, np.repeat(range(10), 2)), SHARE)  # contexts alike: variance between them is 0
    assert (spread.low, spread.high) == pytest.approx(scipys_wilson(0.5, 20), rel=1e-6)
    steady = estimate(rows([0.5] * 6), SHARE)  # no variance at all, of fractions: every group counts once
    assert (steady.low, steady.high) == pytest.approx(scipys_wilson(0.5, 6), rel=1e-6)
    one = estimate(rows([1, 0, 1, 1], [0] * 4), SHARE)  # one context is one answer
    assert (one.low, one.high) == pytest.approx(scipys_wilson(0.75, 1.0), rel=1e-6) and one.groups == 1
    two = estimate(rows([1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]), SHARE)
    assert (two.low, two.high) == pytest.approx(scipys_wilson(0.5, 2.0), rel=1e-6) and two.groups == 2
    plain = estimate(rows([1, 0, 1, 1, 0]), SHARE)  # every answer stands alone: no few-groups factor
    theirs = scipy_stats.binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert (plain.low, plain.high) == nearly((theirs.low, theirs.high))


@pytest.mark.parametrize("table", [(18, 9, 3, 10), (12, 4, 5, 9), (5, 9, 8, 3), (20, 0, 6, 4), (10, 5, 5, 10)])
def test_newcombes_tenth_method_from_the_table_of_four(table):
    """By the counts both right, first alone, second alone, neither, as his paper writes it."""
    a, b, c, d = table
    n = sum(table)
    p1, p2 = (a + b) / n, (a + c) / n
    (low1, high1), (low2, high2) = scipys_wilson(p1, n), scipys_wilson(p2, n)
    gap = a * d - b * c
    corrected = gap - n / 2 if gap > n / 2 else 0 if gap > 0 else gap
    phi = corrected / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    one, two = p1 - low1, high2 - p2
    low = p1 - p2 - math.sqrt(one**2 - 2 * phi * one * two + two**2)
    one, two = high1 - p1, p2 - low2
    high = p1 - p2 + math.sqrt(one**2 - 2 * phi * one * two + two**2)
    mine = rows([1] * (a + b) + [0] * (c + d))
    other = rows([1] * a + [0] * b + [1] * c + [0] * d, arm="b")
    found = difference(mine, other, SHARE)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)
    assert found.value == nearly(p1 - p2) and (found.n, found.groups) == (n, n)
    assert found.error == pytest.approx(max(high - (p1 - p2), p1 - p2 - low) / 1.959964, rel=1e-6)


def test_a_difference_of_clustered_shares_takes_the_smaller_n():
    members = np.repeat(range(5), 4)
    mine, other = np.repeat([1, 1, 0, 0, 1], 4).astype(float), np.tile([1.0, 0, 1, 0], 5)
    found = difference(rows(mine, members), rows(other, members, arm="b"), SHARE)
    want = newcombe(0.6, 0.5, 0.3, max(effective(mine, members), 5.0))
    assert (found.low, found.high) == pytest.approx(want, rel=1e-4)
    blunt = newcombe(0.6, 0.5, 0.3, 20)
    assert found.high - found.low > 1.3 * (blunt[1] - blunt[0])


@pytest.mark.parametrize(
    ("values", "factor", "seeds"),
    [([0.5, 1, 0, 1], 1.0, None), ([1, 1, 0, 1], 0.5, None), ([1, 0, 0, 1], 1.0, [0, 0, 1, 1])],
)
def test_other_differences_are_means_of_differences(values, factor, seeds):
    """Fractions, a factor, and seeds on the same contexts have no table of four."""
    if seeds is None:
        mine, other = rows(values), rows([0, 1, 0, 1], arm="b")
    else:
        mine, other = crossed(np.reshape(values, (2, 2))), crossed(np.reshape([0, 1, 0, 1], (2, 2)), arm="b")
    found = difference(mine, other, SHARE, factor)
    gaps = [a.value - factor * b.value for a, b in zip(mine, other, strict=True)]
    assert found.value == nearly(np.mean(gaps)) and found.interval != estimates.NEWCOMBE
    named = [dataclasses.replace(row, value=gap, arm="a/b") for row, gap in zip(mine, gaps, strict=True)]
    want = estimate(named, MEAN)
    assert (found.low, found.high, found.groups) == (want.low, want.high, want.groups)


def test_a_ratio_is_the_geometric_mean_of_pairs():
    mine, other = rows([2.0, 6.0, 4.0]), rows([1.0, 1.5, 8.0], arm="b")
    found = ratio(mine, other, TIME)
    assert found.value == nearly(scipy_stats.gmean([2.0, 4.0, 0.5]))
    logs = [dataclasses.replace(r, value=math.log(x), arm="a/b/m") for r, x in zip(mine, (2.0, 4.0, 0.5), strict=True)]
    want = estimate(logs, Metric("ratio", ""))
    assert (found.low, found.high) == nearly((math.exp(want.low), math.exp(want.high)))
    assert found.error == nearly(want.error) and (found.n, found.groups, found.interval) == (
        3,
        3,
        estimates.REPEATS,
    )
    assert ratio(mine, other, MEAN).interval == estimates.CONTEXTS
    assert difference(mine, other, TIME).interval == estimates.REPEATS
    far = ratio(rows([1e300, 1e-300]), rows([1e-300, 1e300], arm="b"), TIME)
    assert far.high == math.inf and far.low == 0.0


def test_quartiles_are_numpys():
    values = np.random.default_rng(0).gamma(1.0, size=31)
    found = estimate(rows(values), TIME)
    assert (found.low, found.value, found.high) == tuple(np.percentile(values, [25, 50, 75]))
    assert (found.n, found.groups) == (31, 31) and math.isnan(found.error)


def test_what_an_interval_says():
    assert Estimate(1, 0.1, 2, 3, 3, "x").excludes_zero and Estimate(-1, -2, -0.1, 3, 3, "x").excludes_zero
    assert not Estimate(0, -1, 1, 3, 3, "x").excludes_zero and not Estimate(0, 0.0, 1, 3, 3, "x").excludes_zero
    assert not Estimate(-1, -1, 0.0, 3, 3, "x").excludes_zero
    assert Estimate(0, -1, 1, 3, 3, "x").bounded
    assert not Estimate(0, -1, math.inf, 3, 3, "x").bounded and not Estimate(0, -math.inf, 1, 3, 3, "x").bounded
    assert Estimate(0, -1, math.inf, 3, 2, "x").plain() == {
        "value": 0, "low": -1, "high": None, "n": 3, "groups": 2, "interval": "x", "error": None
    }  # fmt: skip
