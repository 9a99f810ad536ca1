# SPDX-License-Identifier: Apache-2.0
"""Equal error rates against every threshold tried by hand, and what a value for each sample says of their spread."""

import numpy as np
import pytest

from manyheads.tasks._rates import equal_error_rate, equal_error_rate_values


def by_hand(score, label):
    """Of all thresholds that which has misses and false alarms nearest."""
    tried = []
    for at in [*sorted(set(score)), np.inf]:
        misses = np.mean([s < at for s, y in zip(score, label, strict=True) if y])
        alarms = np.mean([s >= at for s, y in zip(score, label, strict=True) if not y])
        tried.append((round(abs(misses - alarms), 12), at, (misses + alarms) / 2))
    return min(tried)[2]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_rate_by_hand(seed):
    rng = np.random.default_rng(seed)
    label = np.arange(37) % (2 + seed % 3) == 0
    score = np.round(rng.standard_normal(37) + label, 1 if seed % 2 else 9)  # with ties, and without
    got = equal_error_rate(score, label)
    assert got == pytest.approx(by_hand(score, label))
    assert equal_error_rate(np.exp(3 * score), label) == pytest.approx(got)  # any monotone scale
    assert not np.isclose(got, by_hand(score, rng.permutation(label)))  # control: other labels


def test_turned_scores_have_the_complement():
    rng = np.random.default_rng(0)
    label = np.arange(200) % 2 == 0
    score = rng.standard_normal(200) + label
    assert equal_error_rate(-score, label) == pytest.approx(1 - equal_error_rate(score, label), abs=1 / 100)
    assert equal_error_rate(score, label) < 0.4


def test_perfect_scores_have_none_and_equal_ones_a_half():
    label = np.array([False] * 5 + [True] * 3)
    assert equal_error_rate(label.astype(float), label) == 0 and equal_error_rate(np.zeros(8), label) == 0.5
    assert np.isnan(equal_error_rate_values(np.zeros(3), np.ones(3, bool))).all()


def test_values_spread_as_the_rate_does():
    """Over many sets the standard error that the values tell is that of the rate; of unweighted errors it is not."""
    rng, label, rates, told, plain = np.random.default_rng(1), np.arange(300) % 6 == 0, [], [], []
    for _ in range(600):
        score = rng.standard_normal(300) + 1.5 * label
        values = equal_error_rate_values(score, label)
        rates.append(values.mean())
        wrong = values > 0
        told.append(np.sqrt(sum(values[label == k].var() * (label == k).sum() for k in (False, True))) / 300)
        plain.append(np.sqrt(wrong.var() / 300))
    assert np.mean(told) == pytest.approx(np.std(rates), rel=0.15)
    assert np.mean(plain) != pytest.approx(np.std(rates), rel=0.15)
