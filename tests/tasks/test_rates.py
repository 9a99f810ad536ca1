# SPDX-License-Identifier: Apache-2.0
"""Error rates against every threshold tried by hand, and what a value for each sample says of their spread."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_roc

from manyheads.experiment import Metric, Row
from manyheads.experiment.estimates import estimate
from manyheads.tasks._rates import detection_cost, eer_errors, equal_error_rate_values


def equal_error_rate(score, label):
    return equal_error_rate_values(score, label).mean()


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


def drawn(count, gap, rng):
    right = rng.random(count) < 0.5
    return rng.standard_normal(count) + gap * right, right


def test_errors_share_is_the_equal_error_rate():
    rng = np.random.default_rng(0)
    for gap in (0.5, 1.5, 3.0):
        scores, right = drawn(2000, gap, rng)
        of_all = binary_roc(torch.from_numpy(scores).sigmoid(), torch.from_numpy(right).int())
        accepted, found = (one.double().numpy() for one in of_all[:2])
        at = np.abs(1 - found - accepted).argmin()
        both = [1 - found[at], accepted[at]]
        assert min(both) <= eer_errors(scores, right).mean() <= max(both) and max(both) - min(both) <= 2e-3
        assert abs(eer_errors(scores, right).mean() - 0.5 * math.erfc(gap / 2 / math.sqrt(2))) < 0.03
    assert eer_errors([0.1, 0.2, 0.8, 0.9], [False, False, True, True]).mean() == 0
    assert eer_errors([0.1, 0.2, 0.8, 0.9], [True, True, False, False]).mean() == 1
    same = np.repeat(rng.random(500), 2)
    assert abs(eer_errors(same, np.tile([True, False], 500)).mean() - 0.5) <= 0.01
    assert (scores >= 0).mean() != right.mean()  # control: a threshold of 0 is another
    assert abs(((scores >= 0) != right).mean() - eer_errors(scores, right).mean()) > 0.05


def test_an_interval_over_errors_is_that_of_the_rate():
    """The threshold is found on the same pairs, yet the mean of errors has the spread of an EER that is found anew."""
    rng = np.random.default_rng(1)
    rates = [eer_errors(*drawn(400, 1.2, rng)).mean() for _ in range(600)]
    scores, right = drawn(400, 1.2, rng)
    errors = eer_errors(scores, right)
    assert 0.8 < errors.std() / math.sqrt(400) / np.std(rates) < 1.25
    metric = Metric("eer", "EER", kind="share")
    rows = [
        Row(task="t", metric="eer", arm="a", value=float(e), sample=f"{i}", context=f"{i // 4}")
        for i, e in enumerate(errors)
    ]
    found = estimate(rows, metric)
    assert 0.7 < (found.high - found.low) / (4 * np.std(rates)) < 1.4 and found.groups == 100
    hard = np.array([eer_errors(*drawn(400, 0.0, rng)).mean() for _ in range(50)])  # control: another rate
    assert not (found.low < hard.mean() < found.high)


def test_the_detection_cost_is_the_least_of_all_thresholds():
    scores, right = drawn(300, 2.0, np.random.default_rng(2))
    costs = [(0.1 * (scores[right] < t).mean() + 0.9 * (scores[~right] >= t).mean()) / 0.1 for t in (*scores, math.inf)]
    assert detection_cost(scores, right).mean() == pytest.approx(min(costs))
    assert detection_cost(scores, right).mean() < np.mean(costs)
    assert detection_cost(-scores, right).mean() == pytest.approx(1.0)  # to refuse all
