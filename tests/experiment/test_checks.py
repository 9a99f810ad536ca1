# SPDX-License-Identifier: Apache-2.0
"""The four words, from intervals made by hand; what a run could have seen, in simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.experiment import Arm, above, at_most, below, estimates, higher, lower, no_worse
from manyheads.experiment.checks import Check, evaluate, find_metric, resolve, word_of
from manyheads.experiment.estimates import CONTEXTS, Estimate
from manyheads.experiment.rows import Metric, Row

LOSS, RIGHT = Metric("loss", "loss"), Metric("right", "right", higher=True, kind="share", floor=0.5)
TIME = Metric("time", "time", "s", kind="time")
METRICS = {("t", "loss"): LOSS, ("t", "right"): RIGHT, ("t", "time"): TIME}
FULL, A, B = Arm("full"), Arm("a", "x", 0.5), Arm("b", "y", 0.5)
ARMS = (FULL, A, B, Arm("b", "y", 0.25))


def rows(arm, values, metric="loss", **more):
    return [
        Row(task="t", metric=metric, arm=arm.key, value=float(v), sample=f"{i}", **more) for i, v in enumerate(values)
    ]


def interval(low, high, value=None):
    return Estimate((low + high) / 2 if value is None else value, low, high, 10, 10, CONTEXTS, (high - low) / 4.5)


@pytest.mark.parametrize(
    ("low", "high", "plain", "margin", "tolerant"),
    [
        (0.1, 0.5, "holds", "holds", "holds"),
        (0.0, 0.5, "inconclusive", "inconclusive", "holds"),
        (-0.1, 0.3, "inconclusive", "inconclusive", "holds"),
        (-0.3, 0.3, "inconclusive", "inconclusive", "inconclusive"),
        (-0.15, -0.1, "contradicted", "inconclusive", "holds"),
        (-0.3, -0.1, "contradicted", "inconclusive", "inconclusive"),
        (-0.5, -0.3, "contradicted", "contradicted", "contradicted"),
        (-math.inf, math.inf, "inconclusive", "inconclusive", "inconclusive"),
    ],
)
@pytest.mark.parametrize("bound", [0.0, 2.0])
def test_words(low, high, plain, margin, tolerant, bound):
    for sign, make in ((1, higher), (-1, lower)):
        bounds = sorted((bound + sign * low, bound + sign * high))
        found = interval(*bounds, value=bound)
        assert word_of(found, make("loss", "a", than="b"), bound) == plain
        assert word_of(found, make("loss", "a", than="b", margin=0.2), bound) == margin
        better = "higher" if sign == 1 else "lower"
        assert word_of(found, no_worse("loss", "a", than="b", margin=0.2, better=better), bound) == tolerant


@given(
    st.floats(-3, 3), st.floats(0, 3), st.floats(0, 1), st.floats(0, 1), st.sampled_from([-1, 1]), st.booleans(),
    st.floats(0, 1),
)  # fmt: skip
def test_the_word_never_depends_on_the_mean_alone(low, width, first, second, sign, tolerant, margin):
    check = Check(metric="loss", arm="a", than="b", sign=sign, margin=margin, tolerant=tolerant)
    one, other = (interval(low, low + width, low + part * width) for part in (first, second))
    assert word_of(one, check, 0.0) == word_of(other, check, 0.0)
    opposite = replace(check, sign=-sign)
    words = {word_of(one, check, 0.0), word_of(one, opposite, 0.0)}
    assert tolerant or words != {"holds"}  # a claim and its opposite never both hold


@pytest.mark.parametrize(("half", "testable"), [(0.05, True), (0.3, False)])
def test_a_baseline_is_above_its_floor_by_its_interval(monkeypatch, half, testable):
    """Both means are 0.7 and above the floor; only one is shown to be."""
    from manyheads.experiment import checks

    monkeypatch.setattr(checks, "estimate", lambda *_: interval(0.7 - half, 0.7 + half))
    made = rows(FULL, [1, 0, 1, 1], "right") + rows(A, [1, 1, 0, 1], "right")
    word = evaluate(higher("right", "a", than="full", at=0.5), made, ARMS, METRICS).word
    assert (word != "not testable here") == testable


def both(a, b, **more):
    return rows(FULL, np.zeros(len(a)), **more) + rows(A, a, **more) + rows(B, b, **more)


def test_evaluate_says_each_of_the_four_words():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (2, 40))
    check = lower("loss", "a", than="b", at=0.5)
    said = [evaluate(check, both(a + shift, b), ARMS, METRICS) for shift in (-2, 0, 2)]
    assert [one.word for one in said] == ["holds", "inconclusive", "contradicted"]
    assert said[1].needed > 40 and said[0].needed is None and said[0].detectable > 0
    skipped = evaluate(check, [], ARMS, METRICS, skipped={"t": "no tokenizer"})
    assert (skipped.word, skipped.reason) == ("not testable here", "no tokenizer")
    blind = both(a, b) + rows(FULL, [0, 1] * 10, "right") + rows(A, [1] * 20, "right")
    failing = evaluate(higher("right", "a", than="full", at=0.5), blind, ARMS, METRICS)
    assert failing.word == "not testable here" and failing.reason.startswith("not discriminative: full itself")
    quick = evaluate(check, both(a - 2, b), ARMS, METRICS, words=False)
    assert quick.word is None and quick.effect.value < 0
    assert evaluate(check, [], ARMS, METRICS, skipped={"t": "x"}, words=False).word is None


def test_the_floor_is_asked_of_the_conditions_that_are_judged():
    good, poor = {"length": 8}, {"length": 64}
    made = rows(FULL, [1] * 30, "right", at=good) + rows(A, [1] * 30, "right", at=good)
    made += rows(FULL, [0] * 30, "right", at=poor) + rows(A, [1] * 30, "right", at=poor)
    check = no_worse("right", "a", than="full", margin=0.2, better="higher", at=0.5)
    assert evaluate(replace(check, where=good), made, ARMS, METRICS).word == "holds"
    assert evaluate(replace(check, where=poor), made, ARMS, METRICS).word == "not testable here"


def test_a_factor_a_ratio_and_a_number():
    rng = np.random.default_rng(1)
    load = np.exp(rng.normal(0, 1, 20))
    made = rows(A, 0.4 * load, "time") + rows(B, load, "time") + rows(A, 0.4 * load) + rows(B, load)
    words = [
        evaluate(check, made, ARMS, METRICS).word
        for check in (
            at_most("time", "a", times=0.5, than="b", at=0.5), at_most("time", "a", times=0.3, than="b", at=0.5),
            at_most("time", "a", times=0.3, than="b", at=0.5, margin=0.2),
            lower("loss", "a", than="b", factor=0.5, at=0.5),
            lower("loss", "a", than="b", factor=0.3, at=0.5),
            above("loss", "a", 0.01, at=0.5), below("loss", "a", 0.01, at=0.5),
        )
    ]  # fmt: skip
    assert words == ["holds", "contradicted", "inconclusive", "holds", "contradicted", "holds", "contradicted"]
    with pytest.raises(ValueError, match="a time tells of the machine"):
        evaluate(below("time", "a", 5.0, at=0.5), made, ARMS, METRICS)


def test_arms_at_other_budgets_and_conditions():
    made = rows(A, [1.0, 1.1, 0.9], at={"length": 64}) + rows(ARMS[3], [3.0, 3.1, 2.9], at={"length": 8})
    check = lower("loss", "a", than="b", at=0.5, than_at=0.25, where={"length": 64}, than_where={"length": 8})
    assert evaluate(check, made, ARMS, METRICS).word == "holds"
    assert str(check) == "loss of a lower than b (length 8) (at a budget of 0.25) (length 64) at a budget of 0.5"
    with pytest.raises(ValueError, match="no row"):
        evaluate(replace(check, where={"length": 65}), made, ARMS, METRICS)


def test_checks_name_what_is_there():
    with pytest.raises(ValueError, match=r"no arm 'a' at 0\.25"):
        resolve(lower("loss", "a", than="b", at=0.25), ARMS, METRICS)
    with pytest.raises(ValueError, match="names 0 metrics"):
        find_metric("los", METRICS)
    with pytest.raises(ValueError, match="names 2 metrics"):
        find_metric("loss", {**METRICS, ("u", "loss"): LOSS})
    assert find_metric("u.loss", {**METRICS, ("u", "loss"): LOSS}) == ("u", "loss")
    one, half = Arm("a", "x", 1), Arm("a", "x", 1.0)  # a slot, and everything
    assert one.full_spec == "x:budget=1" and half.full_spec == "x:budget=1.0"
    assert resolve(lower("loss", "a", than="full", at=1.0), (FULL, one, half), METRICS).arm is half
    assert Arm("a", "x", 1234567).key == "a:budget=1234567"
    with pytest.raises(ValueError, match="margin of 0 or more"):
        lower("loss", "a", than="b", margin=-1.0)
    with pytest.raises(ValueError, match="against a number"):
        above("loss", "a", 1.0, factor=2.0)


@pytest.mark.parametrize("start", [5, 12])
def test_needed_groups_decide_four_times_of_five(monkeypatch, start):
    """Seen from a run whose effect and spread happen to be the true ones."""
    monkeypatch.setattr(estimates, "_DRAWS", 500)
    rng = np.random.default_rng(0)
    check = higher("loss", "a", than="full", at=0.5)
    small = rng.normal(0, 1, start)
    small = 0.35 + (small - small.mean()) / small.std(ddof=1)
    found = evaluate(check, rows(FULL, np.zeros(start)) + rows(A, small), ARMS, METRICS)
    assert found.word == "inconclusive" and 50 < found.needed < 90  # ((1.96 + 0.84) / 0.35)^2 = 64, a little more by t

    def decided(count, runs=250):
        words = [
            evaluate(check, rows(FULL, np.zeros(count)) + rows(A, rng.normal(0.35, 1, count)), ARMS, METRICS).word
            for _ in range(runs)
        ]
        return words.count("holds") / runs

    assert 0.72 <= decided(found.needed) <= 0.9
    assert decided(found.needed // 3) < 0.55  # the control


def test_a_run_sees_what_it_says_it_can_detect(monkeypatch):
    monkeypatch.setattr(estimates, "_DRAWS", 500)
    rng, check, seen, runs = np.random.default_rng(0), higher("loss", "a", than="full", at=0.5), 0, 400
    sizes = [
        evaluate(check, rows(FULL, np.zeros(15)) + rows(A, rng.normal(0, 1, 15)), ARMS, METRICS).detectable
        for _ in range(60)
    ]
    effect = float(np.mean(sizes))
    for _ in range(runs):
        made = rows(FULL, np.zeros(15)) + rows(A, rng.normal(effect, 1, 15))
        seen += evaluate(check, made, ARMS, METRICS).word == "holds"
    assert 0.72 <= seen / runs <= 0.88
