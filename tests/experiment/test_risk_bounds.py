# SPDX-License-Identifier: Apache-2.0
"""Bounds of a risk: exact where there is a formula, ordered as theory says, and kept in as many draws as promised."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta, binom
from torch.distributions import Normal, kl_divergence

from manyheads.errors import UserError
from manyheads.experiment.risk_bounds import (
    binary_kl,
    clopper_pearson,
    gaussian_kl,
    hoeffding,
    kl_inverse,
    massart,
    mcallester,
    rademacher,
    seeger,
)  # fmt: skip
from tolerance import nearly

LOGS = 1_000_000  # roundings as of logarithms that are a thousand times what they cancel to
BAYES = [seeger, mcallester]


@pytest.mark.parametrize(("errors", "n"), [(0, 12), (3, 20), (57, 400), (20, 20)])
def test_clopper_pearson_is_the_quantile_of_a_beta(errors, n):
    low, high = clopper_pearson(errors, n, 0.05)
    assert low == nearly(0.0 if errors == 0 else beta.ppf(0.05, errors, n - errors + 1), steps=LOGS)
    assert high == nearly(1.0 if errors == n else beta.ppf(0.95, errors + 1, n - errors), steps=LOGS)
    if 0 < errors < n:
        assert high != nearly(beta.ppf(0.95, errors, n - errors + 1), steps=LOGS)
    assert errors == n or binom.cdf(errors, n, high) == nearly(0.05, steps=LOGS)


def test_the_kl_of_two_coins_is_inverted():
    for q, bound in ((0.0, 0.1), (0.1, 0.05), (0.7, 0.3), (0.999, 1e-4)):
        p = kl_inverse(q, bound)
        want = brentq(lambda p, q=q, bound=bound: binary_kl(q, p) - bound, q, 1 - 1e-15, xtol=1e-15)
        assert p == nearly(want, steps=500) and q < p < 1
        assert kl_inverse(q, 2 * bound) > p and p != nearly(q + math.sqrt(bound / 2), steps=500)  # Pinsker's
    assert kl_inverse(0.0, 0.1) == nearly(1 - math.exp(-0.1)) and kl_inverse(1.0, 1.0) == 1
    assert binary_kl(0.3, 0.3) == 0 and binary_kl(0.3, 0.0) == math.inf == binary_kl(0.3, 1.0)


@pytest.mark.parametrize("of", BAYES)
def test_pac_bayes_is_monotone_and_above_what_was_seen(of):
    for risk in (0.0, 0.1, 0.5, 1.0):
        by_kl = [of(risk, 200, kl) for kl in (0, 1, 5, 20, 1000)]
        by_n = [of(risk, n, 5.0) for n in (50, 500, 5000, 10**8)]
        assert by_kl == sorted(by_kl) and by_n == sorted(by_n, reverse=True)
        assert all(risk <= bound <= 1 for bound in (*by_kl, *by_n)) and by_n[-1] - risk < 1e-3
        assert of(risk, 200, 5.0, 0.01) >= of(risk, 200, 5.0, 0.1)


def test_the_inverted_kl_is_never_above_pinsker_and_the_exact_bound_below_both():
    for errors in range(0, 200, 7):
        for kl in (0.0, 3.0, 30.0):
            assert seeger(errors / 200, 200, kl) <= mcallester(errors / 200, 200, kl)
        assert clopper_pearson(errors, 200)[1] <= min(seeger(errors / 200, 200), hoeffding(errors / 200, 200))
    assert seeger(0.02, 200, 3.0) < 0.7 * mcallester(0.02, 200, 3.0)
    # The formula as it is printed, and what it is without the root of n.
    want = 0.1 + math.sqrt((3 + math.log(2 * math.sqrt(200) / 0.05)) / 400)
    assert mcallester(0.1, 200, 3.0) == nearly(want)
    assert mcallester(0.1, 200, 3.0) != nearly(0.1 + math.sqrt((3 + math.log(2 / 0.05)) / 400))
    assert hoeffding(0.1, 200) == nearly(0.1 + math.sqrt(math.log(20) / 400))
    assert rademacher(0.1, 200, massart(7, 200)) == nearly(
        min(1, hoeffding(0.1, 200) + 2 * math.sqrt(2 * math.log(7) / 200))
    )


def test_normal_weights():
    rng = np.random.default_rng(0)
    mean, deviation = torch.tensor(rng.normal(size=(3, 4))), torch.tensor(rng.uniform(0.1, 2, (3, 4)))
    want = kl_divergence(Normal(mean, deviation), Normal(*torch.tensor([0.2, 0.7], dtype=torch.float64))).sum()
    assert gaussian_kl(mean, deviation, 0.7, 0.2) == nearly(float(want), steps=256)
    assert gaussian_kl(mean, deviation, 0.7) != nearly(float(want), steps=256)
    assert gaussian_kl(0.0, 0.7, 0.7) == nearly(0.0)
    with pytest.raises(UserError, match="above 0"):
        gaussian_kl(mean, 0.0, 0.7)


@pytest.mark.parametrize("risk", [0.02, 0.3])
def test_bounds_are_kept_as_often_as_promised(risk):
    """A known risk, 1,000 draws: one rule by each bound, and the best of 50 rules, which a single bound is not for."""
    rng, n, delta = np.random.default_rng(1), 60, 0.1
    every = rng.binomial(n, risk, (1000, 50))
    one, best = every[:, 0], every.min(1)
    exact = {k: clopper_pearson(int(k), n, delta)[1] for k in np.unique(every)}
    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / 1000)  # three standard errors of the count
    for bound in (
        lambda k: exact[k], lambda k: hoeffding(k / n, n, delta), lambda k: seeger(k / n, n, 0, delta),
        lambda k: mcallester(k / n, n, 0, delta),
    ):  # fmt: skip
        assert np.mean([bound(k) < risk for k in one]) <= allowed
    for of in BAYES:
        assert np.mean([of(k / n, n, math.log(50), delta) < risk for k in best]) <= allowed
    assert np.mean([rademacher(k / n, n, massart(50, n), delta) < risk for k in best]) <= allowed
    if risk == 0.3:
        assert np.mean([exact[k] < risk for k in best]) > 0.5
        assert np.mean([k / n < risk for k in one]) > allowed


@pytest.mark.parametrize("arguments", [(1.2, 10), (0.1, 0), (0.1, 10, -1.0), (0.1, 10, 0.0, 1.0)])
def test_what_is_no_risk_is_refused(arguments):
    with pytest.raises(UserError):
        seeger(*arguments)
