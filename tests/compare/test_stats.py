# SPDX-License-Identifier: Apache-2.0
"""Intervals against scipy, closed forms, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from manyheads.compare import stats


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (12, 12), (50, 200)])
def test_wilson_is_scipys(right, n):
    theirs = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 500])
def test_t_quantile_is_scipys(freedom):
    assert stats.t_quantile(0.975, freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=1e-5)


def test_newcombe_without_correlation_is_square_and_add():
    """With independent shares the squares of the distances to Wilson's bounds add up."""
    p1, p2, n = 0.6, 0.5, 40
    (low1, high1), (low2, high2) = stats.wilson(p1 * n, n), stats.wilson(p2 * n, n)
    low, high = stats.newcombe(p1, p2, p1 * p2, n)
    assert low == pytest.approx(0.1 - math.hypot(p1 - low1, high2 - p2))
    assert high == pytest.approx(0.1 + math.hypot(high1 - p1, p2 - low2))


def test_newcombe_has_a_width_where_all_answers_agree():
    low, high = stats.newcombe(1.0, 1.0, 1.0, 8)
    assert low < 0 < high
    assert stats.newcombe(0.0, 1.0, 0.0, 8)[1] < 0


def test_newcombe_covers():
    rng, held, runs = np.random.default_rng(0), 0, 1500
    for _ in range(runs):
        shared = rng.random(30)
        a, b = (shared < 0.7).astype(float), ((0.6 * shared + 0.4 * rng.random(30)) < 0.5).astype(float)
        low, high = stats.newcombe(a.mean(), b.mean(), (a * b).mean(), 30)
        held += low <= TRUE_DIFFERENCE <= high
    assert 0.93 <= held / runs <= 0.99


_u = np.random.default_rng(1).random((2, 2_000_000))
TRUE_DIFFERENCE = 0.7 - float(((0.6 * _u[0] + 0.4 * _u[1]) < 0.5).mean())


@pytest.mark.parametrize("groups", [4, 8, 20])
def test_mean_covers_with_few_contexts(groups):
    rng, held, naive, runs = np.random.default_rng(0), 0, 0, 400
    for i in range(runs):
        values = (rng.normal(0, 1, groups)[:, None] + rng.normal(0, 1, (groups, 2))).ravel()
        contexts = np.repeat(np.arange(groups), 2)
        estimate = stats.mean(values, contexts, i, "x", draws=600)
        held += estimate.low <= 0 <= estimate.high
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))  # as if answers of one context were independent
        naive += abs(values.mean()) <= half
    assert 0.91 <= held / runs <= 0.99
    assert naive / runs < 0.90  # the control: leaving the contexts out is too narrow


def test_mean_is_the_percentile_bootstrap_widened():
    values = np.random.default_rng(3).gamma(2.0, 1.0, 40)
    estimate = stats.mean(values, np.arange(40), 0, "x", draws=20_000)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, random_state=0
    ).confidence_interval  # fmt: skip
    width = (estimate.high - estimate.low) / (theirs.high - theirs.low)
    assert width == pytest.approx(
        scipy_stats.t.ppf(0.975, 39) / scipy_stats.norm.ppf(0.975) * math.sqrt(40 / 39), rel=0.03
    )


def test_mean_repeats_and_one_context_has_no_interval():
    values, contexts = np.random.default_rng(0).random(30), np.arange(30) // 2
    assert stats.mean(values, contexts, 0, "x") == stats.mean(values, contexts, 0, "x")
    assert stats.mean(values, contexts, 0, "x") != stats.mean(values, contexts, 1, "x")
    alone = stats.mean(values, np.zeros(30), 0, "x")
    assert math.isinf(alone.low) and not alone.excludes_zero


def test_share_counts_contexts_that_answer_as_one_once():
    alike = stats.share(np.repeat([1.0, 0.0], 20), np.repeat(np.arange(10), 4))
    assert (alike.low, alike.high) == pytest.approx(stats.wilson(5, 10))
    apart = stats.share(np.tile([1.0, 0.0], 20), np.repeat(np.arange(10), 4))
    assert (apart.low, apart.high) == pytest.approx(stats.wilson(20, 40))
    agreed = stats.share(np.ones(40), np.repeat(np.arange(10), 4))
    assert (agreed.low, agreed.high) == pytest.approx(stats.wilson(10, 10)) and agreed.n == 40


def test_paired_difference_is_sharper_than_unpaired():
    rng = np.random.default_rng(0)
    full = (rng.random(60) < 0.5).astype(float)
    arm = full * (rng.random(60) < 0.9)
    paired = stats.share_difference(arm, full, np.arange(60))
    shuffled = stats.share_difference(arm, rng.permutation(full), np.arange(60))
    assert paired.high - paired.low < 0.7 * (shuffled.high - shuffled.low)
