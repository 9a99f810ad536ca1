# SPDX-License-Identifier: Apache-2.0
"""Thresholds keep what they promise on draws of a known risk; curves and calibration errors are those of a formula."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from manyheads.errors import UserError
from manyheads.experiment.risk_bounds import clopper_pearson
from manyheads.experiment.selective import (
    area,
    calibration_error,
    candidates,
    conformal_threshold,
    controlled_threshold,
    risk_coverage,
)  # fmt: skip
from tolerance import nearly

DRAWS = 1000


def error_of(p):
    return math.sqrt(p * (1 - p) / DRAWS)


def test_the_conformal_threshold_is_an_order_statistic():
    scores = np.arange(1.0, 20.0)  # 19: the 18th of 20 places
    assert conformal_threshold(scores, 0.1) == 18 and conformal_threshold(scores[::-1], 0.5) == 10
    assert conformal_threshold(scores[:8], 0.1) == math.inf and conformal_threshold([], 0.1) == math.inf
    with pytest.raises(UserError, match="between 0 and 1"):
        conformal_threshold(scores, 1.0)


def test_false_alarms_are_as_rare_as_promised():
    """Over calibration and use together it is between alarm - 1/(m + 1) and alarm; a plain quantile is above."""
    rng, m, alarm = np.random.default_rng(0), 14, 0.2
    drawn = rng.normal(size=(DRAWS, m + 1))
    ours = np.mean([row[-1] > conformal_threshold(row[:-1], alarm) for row in drawn])
    plain = np.mean([row[-1] > np.quantile(row[:-1], 1 - alarm, method="lower") for row in drawn])
    assert alarm - 1 / (m + 1) - 3 * error_of(alarm) <= ours <= alarm + 3 * error_of(alarm) < plain + error_of(alarm)
    assert plain > alarm + error_of(alarm)


def world(rng, n):
    """Scores in [0, 1], and wrong answers with that probability: the risk of answering up to t is t / 2."""
    scores = rng.random(n)
    return scores, rng.random(n) < scores


def test_a_controlled_threshold_keeps_the_risk():
    rng, risk, delta = np.random.default_rng(2), 0.2, 0.1
    tried = candidates(np.linspace(0, 1, 201))
    found, plain = [], []
    for _ in range(DRAWS // 2):
        scores, wrong = world(rng, 240)
        found.append(controlled_threshold(scores, wrong, tried, risk, delta))
        plain.append(max((t for t in tried if wrong[scores <= t].mean() <= risk), default=-math.inf))
    failed, naive = (np.mean([t / 2 > risk + 1e-9 for t in some]) for some in (found, plain))
    assert failed <= delta + 3 * error_of(delta) * math.sqrt(2) and naive > 2 * delta
    # It is no excuse: most draws answer a fifth or more.
    assert np.mean([t >= 0.2 for t in found]) > 0.5
    scores, wrong = world(rng, 4000)
    large = controlled_threshold(scores, wrong, tried, risk, delta)
    assert 0.3 <= large <= 2 * risk and controlled_threshold(scores, wrong, tried, 0.01, delta) == -math.inf


def test_testing_stops_at_the_first_failure():
    scores = np.repeat([0.1, 0.2, 0.3], 40)
    wrong = np.zeros(120, bool)
    wrong[40:75] = True  # the second step is bad, and a later candidate could only pass by luck
    tried = [0.1, 0.2, 0.3]
    risk = clopper_pearson(35, 120, 0.1)[1] + 1e-6
    assert controlled_threshold(scores, wrong, tried, risk) == 0.1
    assert controlled_threshold(scores, wrong, tried[::2], risk) == 0.3


def test_the_curve_of_risk():
    scores, wrong = np.array([3.0, 1, 2, 2, 4]), np.array([1, 0, 1, 0, 1], bool)
    coverage, risk = risk_coverage(scores, wrong)
    assert coverage.tolist() == nearly([0.2, 0.6, 0.8, 1.0]) and risk.tolist() == nearly([0, 1 / 3, 0.5, 0.6])
    assert area(coverage, risk) == nearly(0.4 / 3 + 0.2 * 0.5 + 0.2 * 0.6)
    flat = risk_coverage(np.zeros(5), wrong)
    assert area(*flat) == nearly(0.6)
    rng = np.random.default_rng(0)
    s, w = world(rng, 500)
    assert area(*risk_coverage(s, w)) < area(*risk_coverage(rng.random(500), w)) < area(*risk_coverage(-s, w))


def test_calibration_error_is_torchmetrics():
    rng = np.random.default_rng(3)
    confidence = np.append(rng.random(300), [0.0, 1.0])
    right = rng.random(302) < confidence**2
    want = binary_calibration_error(torch.tensor(confidence), torch.tensor(right).int(), n_bins=10)
    assert calibration_error(confidence, right) == nearly(float(want), torch.float32)
    assert calibration_error(confidence, right, 15) != nearly(float(want), torch.float32)
