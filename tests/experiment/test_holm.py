# SPDX-License-Identifier: Apache-2.0
"""Holm's correction by intervals gives the words that it gives by chances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from manyheads.experiment.checks import CheckResult, higher, no_worse, word_of
from manyheads.experiment.estimates import CONTEXTS, NEWCOMBE, Estimate, t_quantile
from manyheads.experiment.holm import holm

GROUPS = 6


def result(t, check, groups=GROUPS):
    """A check with an effect of ``t`` standard errors."""
    half = t_quantile(0.975, groups - 1)
    effect = Estimate(t, t - half, t + half, groups, groups, CONTEXTS, 1.0)
    return CheckResult(check=str(check), word=word_of(effect, check, 0.0), effect=effect)


@given(st.lists(st.floats(-12, 12), min_size=1, max_size=7))
def test_words_are_those_of_holm_by_chances(values):
    checks = [higher("m", f"a{i}", than="b") for i in range(len(values))]
    found = holm([result(t, check) for t, check in zip(values, checks, strict=True)], checks)
    chances = 2 * stats.t.sf(np.abs(values), GROUPS - 1)
    order, rejected = np.argsort(chances), np.zeros(len(values), bool)
    for k, i in enumerate(order):
        level = 0.05 / (len(values) - k)
        if abs(chances[i] - level) < 1e-6:  # on the edge either is right
            return
        if chances[i] > level:
            break
        rejected[i] = True
    want = [
        "inconclusive" if not r else "holds" if t > 0 else "contradicted" for r, t in zip(rejected, values, strict=True)
    ]
    assert [one.word for one in found] == want
    for one, check in zip(found, checks, strict=True):
        assert word_of(one.effect, check, 0.0) == one.word and one.effect.interval.endswith(f"Holm of {len(values)}")


def test_one_check_alone_is_as_it_was_and_several_need_more():
    checks = [higher("m", "a", than="b"), higher("m", "c", than="b"), higher("m", "d", than="b")]
    weak = result(2.8, checks[0])
    assert weak.word == "holds" and holm([weak], checks[:1])[0].word == "holds"
    assert holm([weak], checks[:1])[0].effect.low == pytest.approx(weak.effect.low)
    three = holm([weak, result(0.1, checks[1]), result(-0.2, checks[2])], checks)
    assert {one.word for one in three} == {"inconclusive"} and three[0].needed > GROUPS
    skipped = CheckResult(check="x", word="not testable here", reason="why")
    assert holm([weak, skipped, skipped], checks)[0].word == "holds"


def test_margins_and_normal_intervals():
    check = no_worse("m", "a", than="b", margin=5.0, better="higher")
    assert holm([result(-1.0, check)], [check])[0].word == "holds"
    assert holm([result(-4.0, check)], [check])[0].word == "inconclusive"
    effect = Estimate(0.3, 0.3 - 0.196, 0.3 + 0.196, 50, 50, NEWCOMBE, 0.1)
    checks = [higher("m", f"a{i}", than="b") for i in range(2)]
    found = holm([CheckResult(check="x", word="holds", effect=effect)] * 2, checks)
    assert found[0].effect.low == pytest.approx(0.3 - 0.1 * stats.norm.ppf(1 - 0.0125), abs=1e-3)
    assert found[1].effect.low == pytest.approx(effect.low)
