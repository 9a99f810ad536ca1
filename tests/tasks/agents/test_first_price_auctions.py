# SPDX-License-Identifier: Apache-2.0
"""Auctions: what is simulated and logged, the benchmark against all policies, metrics by hand, the exponent."""

import numpy as np
import pytest

from manyheads.data import auctions, files
from manyheads.data.auctions import beta_2_3, logged, simulated
from manyheads.domains.agents.fpabudget import best_bids
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.tasks.agents.first_price_auctions import FirstPriceAuctions, benchmark, exponents
from oracles import tasks
from tolerance import DRAWN, SAME, WRONG, is_close


def test_other_bids_come_from_the_distribution_that_is_stated():
    values, others = simulated(4, 5000, np.random.default_rng(0))

    def distance(drawn, of):  # Kolmogorov's; 0.87 over the root of the draws is expected
        drawn = np.sort(drawn.ravel())
        return np.abs(np.arange(1, len(drawn) + 1) / len(drawn) - of(drawn)).max() / (0.87 * len(drawn) ** -0.5)

    assert max(distance(values, lambda x: x), distance(others, beta_2_3)) < DRAWN
    assert min(distance(others, lambda x: x), distance(others, lambda x: beta_2_3(x) ** 1.1)) > WRONG
    assert is_close(beta_2_3(np.array([0.0, 0.5, 1.0])), [0, 0.6875, 1], SAME)


def test_auctions_of_a_log(monkeypatch):
    lines = "\n".join(f"0 {30 * (i + 1)} {0.001 * (1 + i % 3)}" for i in range(7))
    monkeypatch.setattr(files, "text", lambda name: lines)
    values, others = logged(3)
    assert values.shape == others.shape == (2, 3)  # the seventh is left over
    assert is_close(others.ravel(), np.arange(1, 7) / 10, SAME)
    chances = np.array([1, 2, 3, 1, 2, 3, 1.0])
    assert is_close(values.ravel(), 0.35 * chances[:6] / chances.mean(), SAME)


def test_the_public_log():
    if files.local("ipinyou-2997") is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    values, others = logged(20_000)
    assert values.shape == (7, 20_000) and values.min() > 0 and values.max() <= 1
    assert others.max() == pytest.approx(277 / 300, abs=0.1) and others.mean() == pytest.approx(55.2 / 300, rel=0.1)


def test_no_policy_is_better_than_the_benchmark():
    """Of bids by any price whose expected payments keep to the budget; the best of them is near to it."""
    rng = np.random.default_rng(1)
    values, grid = rng.random(3000), np.linspace(0, 1, 401)
    chance, rho = beta_2_3(grid), 0.08
    found, gains = benchmark(values, chance, rho), []
    for price in np.linspace(0, 3, 60):
        bids = grid[best_bids(values, np.full(3000, price), chance)]
        if (bids * beta_2_3(bids)).mean() <= rho:
            gains.append(((values - bids) * beta_2_3(bids)).mean())
    for _ in range(20):  # and others
        bids = values * rng.random() * rng.random(3000) ** rng.random()
        if (bids * beta_2_3(bids)).mean() <= rho:
            gains.append(((values - bids) * beta_2_3(bids)).mean())
    assert max(gains) <= found + 1e-5 and found - max(gains) < 1e-3
    free = benchmark(values, chance, 1.0)  # what would be without a budget, which all can exceed that
    assert free > found + 0.005
    assert is_close(free, ((values[:, None] - grid) * chance).max(1).mean(), 1e-4)


def test_metrics_are_those_by_hand(monkeypatch):
    values, others = np.array([[0.5, 0.8], [1.0, 0.2]]), np.array([[0.2, 0.9], [0.5, 0.1]])
    task = FirstPriceAuctions(rounds=(2,), runs=2, rho=0.4)
    monkeypatch.setattr(FirstPriceAuctions, "auctions", lambda self, rounds: (values, others))
    monkeypatch.setattr(FirstPriceAuctions, "best", lambda self, values, others: np.array([0.3, 0.4]))
    rows = list(task.played(lambda v, d, rho: np.array([[0.25, 0.25], [0.5, 0.25]])))  # won: first; both
    found = {metric: [value for name, _, value in rows if name == metric] for metric in ("regret", "gain", "spent")}
    assert is_close(found["gain"], [0.125, 0.225], SAME)
    assert is_close(found["regret"], [0.175, 0.175], SAME)
    assert is_close(found["spent"], [0.125 / 0.4, 0.375 / 0.4], SAME)
    assert "exponent" not in {metric for metric, _, _ in rows}  # of one T there is none


def test_the_exponent_is_that_of_the_mean_loss():
    rounds, rng = (100, 400, 1600), np.random.default_rng(0)
    totals = np.outer(np.array(rounds) ** 0.6, rng.random(8) + 0.5)
    assert is_close(exponents(totals, rounds), np.full(8, 0.6), SAME)
    noisy = totals * (1 + 0.1 * rng.normal(size=totals.shape))
    slope = np.polyfit(np.log(rounds), np.log(noisy.mean(1)), 1)[0]
    values = exponents(noisy, rounds)
    assert abs(values.mean() - slope) < values.std() / 8**0.5
    assert np.isnan(exponents(-totals, rounds)).all()


def test_all_bidders_meet_the_same_auctions():
    task = FirstPriceAuctions(rounds=(40, 80), runs=3)
    arms = [Arm(name, spec) for name, spec in (("a", "fpabudget"), ("b", "fpabudget:rule=shading"), ("c", "fpabudget"))]
    rows = tasks.rows(task, tasks.context(*arms))
    by_arm = [tasks.values(rows, "regret", name) for name in "abc"]
    assert (by_arm[0] == by_arm[2]).all() and (by_arm[0] != by_arm[1]).any()
    other = FirstPriceAuctions(rounds=(40, 80), runs=3, draw=1).auctions(40)[0]
    assert (other != task.auctions(40)[0]).all()


def test_fields_that_will_not_do():
    for fields in ({"rounds": ()}, {"rounds": (1,)}, {"runs": 1}, {"rho": 0.0}):
        with pytest.raises(UserError):
            FirstPriceAuctions(**fields)
    with pytest.raises(UserError, match="does not bid"):
        tasks.rows(FirstPriceAuctions(rounds=(9,), runs=2), tasks.context(Arm("resper", "resper")))
    assert auctions.__all__
