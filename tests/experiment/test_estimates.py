# SPDX-License-Identifier: Apache-2.0
"""Intervals against scipy, closed forms, and how often they hold the truth in simulation."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from manyheads.errors import UserError
from manyheads.experiment import estimates
from manyheads.experiment.estimates import Estimate, difference, estimate, newcombe, paired, ratio, wilson
from manyheads.experiment.rows import Metric
from oracles.rows import crossed, rows
from tolerance import DRAWN, WRONG, nearly, spread_error

SHARE = Metric("m", "share", higher=True, kind="share")
MEAN = Metric("m", "mean")
TIME = Metric("m", "time", "s", kind="time")


@pytest.fixture
def few_draws(monkeypatch):
    """A bootstrap of 500 draws, for simulations of many runs."""
    monkeypatch.setattr(estimates, "_DRAWS", 500)


def coverage(make, truth, judge, runs):
    """Shares of runs whose interval holds ``truth``, and of those where one that takes rows for independent does."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(runs):
        made = make(rng)
        found = judge(made)
        held += found.low <= truth <= found.high
        values = np.array([row.value for row in made])
        naive += abs(values.mean() - truth) <= 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return held / runs, naive / runs


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (12, 12), (50, 200)])
def test_wilson_is_scipys(right, n):
    theirs = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == nearly((theirs.low, theirs.high))


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 500])
def test_t_quantile_is_scipys(freedom):
    assert estimates.t_quantile(0.975, freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=1e-5)


def test_newcombe_without_correlation_is_square_and_add():
    """With independent shares the squares of the distances to Wilson's bounds add up."""
    p1, p2, n = 0.6, 0.5, 40
    (low1, high1), (low2, high2) = wilson(p1 * n, n), wilson(p2 * n, n)
    low, high = newcombe(p1, p2, p1 * p2, n)
    assert low == nearly(0.1 - math.hypot(p1 - low1, high2 - p2))
    assert high == nearly(0.1 + math.hypot(high1 - p1, p2 - low2))


@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0])
def test_newcombe_has_a_width_where_all_answers_agree(p):
    low, high = newcombe(p, p, p, 8)
    assert low < -0.02 and high > 0.02
    assert newcombe(0.0, 1.0, 0.0, 8)[1] < 0


@pytest.mark.parametrize(("groups", "size", "p", "tight"), [(6, 4, 0.7, 0.5), (20, 4, 0.8, 0.5), (40, 2, 0.6, 2.0)])
def test_a_share_of_clustered_answers_covers(groups, size, p, tight):
    def make(rng):
        of_context = rng.beta(tight * p, tight * (1 - p), groups)[:, None]
        return rows((rng.random((groups, size)) < of_context).ravel(), np.repeat(np.arange(groups), size))

    held, naive = coverage(make, p, lambda made: estimate(made, SHARE), 600)
    assert 0.92 <= held <= 0.995
    assert naive < 0.89  # the control: leaving the contexts out is too narrow


@pytest.mark.parametrize(("groups", "a", "b"), [(5, 2, 2), (12, 8, 2), (30, 50, 50)])
def test_a_share_of_fractions_covers_without_waste(groups, a, b):
    widths = []

    def judge(made):
        widths.append((found := estimate(made, SHARE)).high - found.low)
        return found

    held, _ = coverage(lambda rng: rows(rng.beta(a, b, groups)), a / (a + b), judge, 600)
    assert 0.92 <= held <= 0.985
    # Fractions vary less than answers of 0 and 1 would: taking them for such would be wider.
    assert np.mean(widths) < 0.9 * np.subtract(*wilson(groups * a / (a + b), groups)[::-1])


@pytest.mark.parametrize(("seeds", "contexts", "spread"), [(3, 30, 0.0), (3, 30, 1.5), (5, 10, 0.7)])
def test_seeds_by_contexts_cover(few_draws, seeds, contexts, spread):
    def make(rng):
        both = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 1, (1, contexts))
        return crossed(both + rng.normal(0, 1, (seeds, contexts)))

    held, naive = coverage(make, 0.0, lambda made: estimate(made, MEAN), 300)
    assert held >= 0.92  # too wide rather than too narrow
    assert naive < 0.87

    def answers(rng):
        both = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 1, (1, contexts))
        return crossed(rng.random((seeds, contexts)) < 1 / (1 + np.exp(-both)))

    assert coverage(answers, 0.5, lambda made: estimate(made, SHARE), 300)[0] >= 0.92


def test_seeds_with_contexts_of_their_own_count_as_the_groups(few_draws):
    """Such contexts share a training: taking them for independent is too narrow."""

    def make(rng):
        values = rng.normal(0, 1, (4, 1)) + rng.normal(0, 1, (4, 20))
        return rows(values.ravel(), range(80), np.repeat(np.arange(4), 20))

    held, naive = coverage(make, 0.0, lambda made: estimate(made, MEAN), 300)
    assert 0.91 <= held <= 0.99 and naive < 0.6
    found = estimate(make(np.random.default_rng(0)), MEAN)
    assert found.groups == 4 and found.interval == estimates.SEEDS


@pytest.mark.parametrize("groups", [4, 8, 20])
def test_a_mean_covers_with_few_contexts(few_draws, groups):
    def make(rng):
        values = rng.normal(0, 1, (groups, 1)) + rng.normal(0, 1, (groups, 2))
        return rows(values.ravel(), np.repeat(np.arange(groups), 2))

    held, naive = coverage(make, 0.0, lambda made: estimate(made, MEAN), 400)
    assert 0.91 <= held <= 0.99
    assert naive < 0.90


def test_a_mean_is_the_percentile_bootstrap_widened(monkeypatch):
    draws = 40_000
    monkeypatch.setattr(estimates, "_DRAWS", draws)
    values = np.random.default_rng(3).gamma(2.0, 1.0, 40)
    found = estimate(rows(values), MEAN)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=draws, random_state=0
    ).confidence_interval  # fmt: skip
    wider = scipy_stats.t.ppf(0.975, 39) / scipy_stats.norm.ppf(0.975) * math.sqrt(40 / 39)
    ratio = (found.high - found.low) / (theirs.high - theirs.low)
    # A bound, p = 0.025 of a normal distribution, has the error sqrt(p (1 - p) / draws) / density; four make the ratio.
    expected = 2 * math.sqrt(0.025 * 0.975 / draws) / scipy_stats.norm.pdf(1.96) / 3.92
    assert abs(ratio / wider - 1) < DRAWN * expected and abs(ratio / math.sqrt(40 / 39) - 1) > WRONG * expected
    error = math.sqrt(40) * found.error
    assert spread_error(error, values.std(ddof=1), draws) < DRAWN
    assert spread_error(error, values.std(), draws) > WRONG  # the root of g / (g - 1) left out


def test_many_contexts_are_drawn_in_parts(monkeypatch):
    values = np.random.default_rng(0).normal(0, 1, 300)
    whole = estimate(rows(values), MEAN)
    monkeypatch.setattr(estimates, "_AT_ONCE", 7 * 300)
    parts = estimate(rows(values), MEAN)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=0.1)


def test_the_draws_are_named_by_the_arm_and_one_context_has_no_interval():
    values, groups = np.random.default_rng(0).random(30), np.arange(30) // 2
    made, other = rows(values, groups), rows(values, groups, arm="b")
    assert estimate(made, MEAN) == estimate(made, MEAN) != estimate(other, MEAN)
    alone = estimate(rows(np.random.default_rng(0).random(30), [0] * 30), MEAN)
    assert not alone.bounded and not alone.excludes_zero and alone.interval == estimates.NONE
    assert alone.plain()["low"] is None and alone.plain()["error"] is None


def test_a_share_counts_contexts_that_answer_as_one_once():
    members = np.repeat(np.arange(10), 4)
    alike = estimate(rows(np.repeat([1.0, 0.0], 20), members), SHARE)
    assert (alike.low, alike.high) == nearly(wilson(5, 10))
    apart = estimate(rows(np.tile([1.0, 0.0], 20), members), SHARE)
    assert (apart.low, apart.high) == nearly(wilson(20, 40))
    agreed = estimate(rows(np.ones(40), members), SHARE)
    assert (agreed.low, agreed.high) == nearly(wilson(10, 10)) and (agreed.n, agreed.groups) == (40, 10)
    # One context that holds most of the answers is most of what there is to count.
    crowded = estimate(rows(np.ones(40), [0] * 31 + list(range(1, 10))), SHARE)
    assert crowded.low < 0.5 < agreed.low


def test_shares_stay_between_0_and_1():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 12))
        values = np.clip(rng.normal(rng.random(), 0.3, n), 0, 1)
        found = estimate(rows(values, rng.integers(0, 4, n), rng.integers(0, 3, n)), SHARE)
        assert 0 <= found.low <= found.value <= found.high <= 1
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimate(rows([0.5, 1.2]), SHARE)


def test_a_difference_of_shares_covers():
    rng, held, alike, runs = np.random.default_rng(0), 0, 0, 800
    u = np.random.default_rng(1).random((2, 1_000_000))
    truth = 0.7 - float(((0.6 * u[0] + 0.4 * u[1]) < 0.5).mean())
    for _ in range(runs):
        shared = rng.random(30)
        one, other = rows(shared < 0.7), rows((0.6 * shared + 0.4 * rng.random(30)) < 0.5, arm="b")
        found = difference(one, other, SHARE)
        assert found.interval == estimates.NEWCOMBE
        held += found.low <= truth <= found.high
        half = 0.2 * (found.high - found.low)
        alike += abs(found.value - truth) <= half
    assert 0.93 <= held / runs <= 0.99
    assert alike / runs < 0.75  # the control: a narrower interval is found out


def test_a_difference_of_clustered_shares_covers(few_draws):
    """Contexts that suit one arm and not the other: the difference too hangs together within a context."""
    members = np.repeat(np.arange(15), 4)

    def make(rng):
        chance = rng.beta(1, 1, (15, 1, 2))
        answers = rng.random((15, 4, 2)) < chance
        return answers.reshape(60, 2)

    rng, held, runs = np.random.default_rng(0), 0, 500
    for _ in range(runs):
        answers = make(rng)
        found = difference(rows(answers[:, 0], members), rows(answers[:, 1], members, arm="b"), SHARE)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / runs <= 0.995


def test_a_paired_difference_is_sharper_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    full = rng.random(60) < 0.5
    arm = full & (rng.random(60) < 0.9)
    sharp, blunt = (difference(rows(arm), rows(other, arm="b"), SHARE) for other in (full, rng.permutation(full)))
    assert sharp.high - sharp.low < 0.7 * (blunt.high - blunt.low)


def test_a_difference_takes_a_factor_and_conditions_that_are_left_out_of_the_pairs():
    long = rows([2.0, 4.0, 9.0], at={"length": 4096})
    short = rows([1.0, 2.0, 4.0], arm="b", at={"length": 1024})
    with pytest.raises(UserError, match=r"a was measured on 0 \(seed 0\) and b was not"):
        difference(long, short, MEAN)
    found = difference(long, short, MEAN, factor=2.0, ignoring=frozenset({"length"}))
    assert found.value == nearly(1 / 3)


def test_pairs_are_whole():
    one, other = rows([1.0, 2.0, 3.0]), rows([3.0, 2.0, 1.0], arm="b")
    turned = difference(one, other[::-1], MEAN)
    assert turned == difference(one, other, MEAN)  # by sample, not by order
    assert turned.value == 0 and difference(one, rows([1.0, 2.0, 4.0], arm="b"), MEAN).value < 0
    assert paired(one, other)
    for mine, beside in ((one[:2], other), (one, other[:2]), (one, [*other, other[0]]), ([*one, one[0]], other)):
        assert not paired(mine, beside)
        with pytest.raises(UserError, match=r"was not: finish the run|several values on one sample"):
            difference(mine, beside, MEAN)
    with pytest.raises(UserError, match="was not"):
        difference(one, rows([1.0, 2.0, 3.0], seeds=[1, 1, 1], arm="b"), MEAN)
    with pytest.raises(UserError, match="the other arm was not"):
        difference(one, [], MEAN)


def test_a_time_is_its_median_with_quartiles():
    found = estimate(rows([5.0, 1.0, 2.0, 3.0, 100.0]), TIME)
    assert (found.value, found.low, found.high, found.interval) == (3.0, 2.0, 5.0, estimates.QUARTILES)


def test_a_ratio_of_times_covers(few_draws):
    """Each repetition is slow or fast for both arms: the ratio of the same one is sharp, that of medians is not."""
    rng, held, runs, widths = np.random.default_rng(0), 0, 400, []
    for _ in range(runs):
        load = np.exp(rng.normal(0, 1, 12))
        one, other = load * np.exp(rng.normal(0, 0.1, 12)) / 2, load * np.exp(rng.normal(0, 0.1, 12))
        found = ratio(rows(one), rows(other, arm="b"), TIME)
        held += found.low <= 0.5 <= found.high
        widths.append(found.high / found.low)
    assert 0.91 <= held / runs <= 0.985
    assert np.mean(widths) < 1.3 and found.interval == estimates.REPEATS
    back = ratio(rows(other), rows(one, arm="b"), TIME)
    assert back.value == nearly(1 / found.value)


def test_a_ratio_needs_positive_values_and_several_repetitions():
    with pytest.raises(UserError, match="positive"):
        ratio(rows([1.0, 0.0]), rows([1.0, 1.0], arm="b"), TIME)
    alone = ratio(rows([1.0]), rows([2.0], arm="b"), TIME)
    assert (alone.value, alone.low, alone.high, alone.interval) == (0.5, 0.0, math.inf, estimates.NONE)


def test_an_estimate_changes_its_unit():
    found = Estimate(2.0, 1.0, 4.0, 5, 5, "x", 0.5).scaled(-1000)
    assert (found.value, found.low, found.high, found.error) == (-2000, -4000, -1000, 500)


def test_rows_are_numbers():
    with pytest.raises(ValueError, match="not finite"):
        rows([math.nan])
    with pytest.raises(ValueError, match="needs rows"):
        estimate([], MEAN)
