# SPDX-License-Identifier: Apache-2.0
"""The four words, from intervals made by hand; what a run could have seen, in simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from manyheads.experiment import Arm, above, at_most, below, estimates, higher, lower, no_worse
from manyheads.experiment.checks import Check, evaluate, find_metric, resolve, word_of
from manyheads.experiment.estimates import CONTEXTS, Estimate
from manyheads.experiment.rows import Metric, Row
from tolerance import nearly

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


def test_a_check_that_rests_on_another_says_nothing_unless_that_holds():
    """An arm that has not learned what it is to lose loses nothing, which is no merit."""
    made = rows(FULL, np.zeros(40)) + rows(A, np.linspace(-3, -2, 40)) + rows(B, np.linspace(0, 1, 40))
    check = lower("loss", "a", than="b", at=0.5)
    for number, word in ((-1.0, "holds"), (-2.5, "not testable here"), (-4.0, "not testable here")):
        found = evaluate(replace(check, given=below("loss", "a", number, at=0.5)), made, ARMS, METRICS)
        assert found.word == word and found.effect == evaluate(check, made, ARMS, METRICS).effect
        assert (f"below {number:g}" in found.reason) == (word != "holds")
    with pytest.raises(ValueError, match="no_such"):
        resolve(replace(check, given=below("no_such", "a", 0.0, at=0.5)), ARMS, METRICS)


def test_the_floor_is_asked_of_the_conditions_that_are_judged():
    good, poor = {"length": 8}, {"length": 64}
    made = rows(FULL, [1] * 30, "right", at=good) + rows(A, [1] * 30, "right", at=good)
    made += rows(FULL, [0] * 30, "right", at=poor) + rows(A, [1] * 30, "right", at=poor)
    check = no_worse("right", "a", than="full", margin=0.2, better="higher", at=0.5)
    assert evaluate(replace(check, where=good), made, ARMS, METRICS).word == "holds"
    assert evaluate(replace(check, where=poor), made, ARMS, METRICS).word == "not testable here"


def test_a_check_may_name_what_has_to_succeed():
    """The baseline fails, the named arm does not, and the other way round."""
    fails, right = [0] * 30, [1] * 30
    for of_base, of_b, plain, named in (
        (fails, right, "not testable here", "holds"), (right, fails, "holds", "not testable here"),
    ):  # fmt: skip
        made = rows(FULL, of_base, "right") + rows(Arm("c"), of_b, "right") + rows(A, right, "right")
        arms, check = (*ARMS, Arm("c")), above("right", "a", 0.6, at=0.5)
        assert evaluate(check, made, arms, METRICS).word == plain
        assert evaluate(replace(check, base="c"), made, arms, METRICS).word == named
    with pytest.raises(ValueError, match="no arm 'd'"):
        resolve(replace(check, base="d"), arms, METRICS)


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


def judged(low, high, check, monkeypatch, *, value=None, groups=10, kind=CONTEXTS, error=None):
    """What a check says of an effect with a given interval."""
    from manyheads.experiment import checks

    middle = (low + high) / 2 if value is None else value
    error = (high - low) / 5 if error is None else error
    found = Estimate(middle, low, high, 3 * groups, groups, kind, error)
    for name in ("difference", "ratio", "estimate"):
        monkeypatch.setattr(checks, name, lambda *_: found)
    return evaluate(check, rows(FULL, [0.0]) + rows(A, [1.0]) + rows(B, [1.0]), ARMS, METRICS)


def least(found, edge, power=0.8416212335729143, few=True):
    """Fewest groups that see the effect four times of five, one by one."""
    half = max(found.high - found.value, found.value - found.low)
    for groups in range(2, 100_000):
        t = stats.t.ppf(0.975, groups - 1) / stats.t.ppf(0.975, found.groups - 1) if few else 1.0
        if (half * t + power * found.error) * math.sqrt(found.groups / groups) <= abs(found.value - edge):
            return groups
    return None


@pytest.mark.parametrize("kind", [CONTEXTS, estimates.SEEDS, estimates.BOTH, estimates.REPEATS, estimates.WILSON])
@pytest.mark.parametrize(
    ("low", "high", "margin", "tolerant", "edge"),
    [
        (-0.1, 0.5, 0.0, False, 0.0),  # towards the claim: zero is to be cleared
        (-0.5, 0.1, 0.0, False, 0.0),
        (-0.1, 0.5, 0.2, False, 0.0),
        (-0.5, 0.1, 0.3, False, -0.3),  # away from it: the margin too
        (-0.5, 0.1, 0.1, False, -0.1),
        (-0.5, 0.1, 0.3, True, -0.3),  # non-inferiority: the margin on either side
        (-0.7, 0.1, 0.2, True, -0.2),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_needed_groups_and_the_least_effect_by_hand(monkeypatch, kind, low, high, margin, tolerant, edge, sign):
    check = Check(metric="loss", arm="a", than="b", sign=sign, margin=margin, tolerant=tolerant, at=0.5, than_at=0.5)
    bounds = sorted((sign * low, sign * high))
    said = judged(*bounds, check, monkeypatch, kind=kind)
    assert said.word == "inconclusive" and said.bound == 0
    assert said.detectable == nearly((high - low) / 2 + stats.norm.ppf(0.8) * (high - low) / 5)
    want = least(said.effect, sign * edge, few=kind != estimates.WILSON)
    assert said.needed == pytest.approx(want, abs=1 if want > 500 else 0)  # from 500 groups on t is the normal quantile


def test_a_lopsided_interval_counts_by_its_wider_side(monkeypatch):
    said = judged(-0.1, 0.4, higher("loss", "a", than="b", at=0.5), monkeypatch, value=0.12)
    assert said.detectable == nearly(0.28 + stats.norm.ppf(0.8) * 0.1) and said.needed == least(said.effect, 0.0)


def test_power_of_a_ratio_is_on_its_logarithm(monkeypatch):
    check = at_most("loss", "a", times=0.5, than="b", at=0.5, margin=0.1)
    said = judged(0.3, 0.6, check, monkeypatch, value=0.45, error=0.15)
    assert (said.word, said.bound) == ("inconclusive", 0.5)
    half = math.log(0.45 / 0.3)
    assert said.detectable == nearly(math.exp(half + stats.norm.ppf(0.8) * 0.15))
    logs = Estimate(math.log(0.45), math.log(0.3), math.log(0.6), 30, 10, CONTEXTS, 0.15)
    assert said.needed == least(logs, math.log(0.5))
    wide = judged(0.3, 0.9, at_most("loss", "a", times=0.5, than="b", at=0.5, margin=0.1), monkeypatch, value=0.53)
    assert wide.needed == least(
        Estimate(math.log(0.53), math.log(0.3), math.log(0.9), 30, 10, CONTEXTS, 0.12), math.log(0.6)
    )


def test_what_has_no_power_says_none(monkeypatch):
    check = higher("loss", "a", than="b", at=0.5)
    endless = judged(-math.inf, math.inf, check, monkeypatch, value=1.0, error=math.nan)
    assert (endless.word, endless.detectable, endless.needed) == ("inconclusive", None, None)
    nothing = judged(-0.5, 0.5, check, monkeypatch)  # an effect of zero would need endless samples
    assert nothing.needed is None and nothing.detectable == nearly(0.5 + stats.norm.ppf(0.8) * 0.2)
    tiny = judged(-0.5, 0.5 + 1e-9, check, monkeypatch)
    assert tiny.needed is None  # more than could be asked for
    huge = judged(-0.5, 0.52, check, monkeypatch, kind=estimates.WILSON)
    assert huge.needed == pytest.approx((0.51 + stats.norm.ppf(0.8) * 0.204) ** 2 * 10 / 0.01**2, rel=1e-3)


def test_a_check_in_words():
    where, other = {"length": 64, "depth": 0.5}, {"length": 8}
    said = [
        (lower("loss", "a", than="b"), "loss of a lower than b"),
        (higher("t.loss", "a", than="b", at=0.5), "t.loss of a higher than b at a budget of 0.5"),
        (no_worse("loss", "a", than="b", margin=0.2, better="lower"), "loss of a no higher than b, margin 0.2"),
        (no_worse("loss", "a", than="b", margin=0.2, better="higher"), "loss of a no lower than b, margin 0.2"),
        (above("loss", "a", 0.25, margin=0.1), "loss of a above 0.25, margin 0.1"),
        (below("loss", "a", 3, where=where), "loss of a below 3 (length 64, depth 0.5)"),
        (at_most("time", "a", times=0.5, than="b"), "time of a lower than 0.5 x b, sample by sample"),
        (lower("loss", "a", than="b", where=where, than_where=other),
         "loss of a lower than b (length 8) (length 64, depth 0.5)"),
    ]  # fmt: skip
    for check, words in said:
        assert str(check) == words
    with pytest.raises(ValueError, match="sign of"):
        Check(metric="loss", arm="a", than="b", sign=0)
    for more in ({"relative": True}, {"than_where": {}}):
        with pytest.raises(ValueError, match="against a number"):
            above("loss", "a", 1.0, **more)


def test_conditions_that_differ_on_purpose_are_left_out_of_the_pairs():
    """Only those of the two sides: another condition still pairs, and without an other side so does the first."""
    at = [{"length": n, "depth": d} for n in (8, 64) for d in (0.1, 0.9)]
    made = [
        Row(task="t", metric="loss", arm=arm.key, value=v + i, sample=f"{i}", at=here)
        for i in range(4) for here in at for arm, v in ((A, here["length"] + here["depth"]), (B, 10 * here["depth"]))
    ]  # fmt: skip
    check = lower("loss", "a", than="b", at=0.5, where={"length": 64}, than_where={"length": 8})
    found = evaluate(check, made, ARMS, METRICS).effect
    assert found.n == 8 and found.value == nearly(64 + 0.5 - 5)
    both = evaluate(lower("loss", "a", than="b", at=0.5), made, ARMS, METRICS).effect
    assert both.n == 16 and both.value == nearly(36 + 0.5 - 5)


def test_a_baseline_at_its_floor_or_without_rows():
    from manyheads.experiment.checks import not_discriminative

    good, poor = rows(FULL, [1] * 40, "right"), rows(FULL, [1, 0] * 20, "right")
    assert not_discriminative(RIGHT, good, FULL) is None and not_discriminative(LOSS, poor, FULL) is None
    assert not_discriminative(RIGHT, good, A) is None  # no row of it: nothing to say
    said = not_discriminative(RIGHT, [*poor, *rows(A, [1] * 40, "right")], FULL)  # the baseline's rows alone count
    assert said.startswith(
        "not discriminative: full itself reaches 50 % (35 to 65); only where it is surely above 50 %"
    )
