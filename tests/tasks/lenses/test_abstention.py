# SPDX-License-Identifier: Apache-2.0
"""Rows of abstention: AUROC within kinds, controls at chance, thresholds and bounds on a population of known risk."""

import math

import numpy as np
import pytest

from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks._statistics import auroc
from manyheads.tasks.lenses import abstention
from manyheads.tasks.lenses.abstention import Abstention
from oracles.tasks import context, values
from tiny.answers import drawn
from tolerance import nearly

NAMES = ("entropy", "source mass", "uncertainty", "attention", "both", "level", "random", "shuffled")
TASK = Abstention(questions=60, kinds=("sums", "facts"), splits=12, draws=20)
SEEDS = (0, 1)


def found(monkeypatch, answers):
    monkeypatch.setattr(abstention, "read_answers", lambda *args, **more: answers)
    monkeypatch.setattr(abstention, "known_answers", lambda kind, count, rng, texts: [None] * count)
    run = context(*map(Arm, NAMES), subject=CausalLM("default"), seeds=SEEDS)
    return [row for unit in TASK.units(run) for row in TASK.measure(run, unit)]


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        return found(patch, drawn(120, told=1.5, by_heads=2.0))


def test_detectors_tell_what_is_there_and_controls_nothing(rows):
    mean = {name: values(rows, "auroc", name, kind="all").mean() for name in NAMES}
    assert mean["entropy"] > 0.75 and mean["attention"] > 0.75 and mean["both"] > mean["entropy"] + 0.02
    assert mean["both"] > mean["uncertainty"] + 0.02
    assert abs(mean["random"] - 0.5) < 0.15 and abs(mean["shuffled"] - 0.5) < 0.2
    assert mean["level"] == nearly(0.5)  # all are of one: their pairs are those of one kind
    assert values(rows, "auroc", "both", kind="one level").mean() == nearly(mean["both"])
    assert len(values(rows, "auroc", "both", kind="sums")) == 60 * len(SEEDS)
    assert values(rows, "wrong", "entropy").mean() == pytest.approx(0.5, abs=0.15)


def test_kinds_are_not_told_apart(monkeypatch):
    """All sums wrong, nearly all facts right: a detector that knows the kind would be nearly perfect; pairs of one kind
    tell that it knows nothing.
    """
    answers = drawn(120, told=0.0, by_heads=0.0, seed=3)
    for i, answer in enumerate(answers):
        hard = answer.question.kind == "sums"
        object.__setattr__(answer, "right", bool((i % 24) == 0) if hard else bool(i % 24 != 1))
        object.__setattr__(answer, "entropy", answer.entropy + 50.0 * hard)
    wrong = np.array([not a.right for a in answers])
    assert auroc(np.array([a.entropy.mean() for a in answers]), wrong) > 0.85
    assert abs(values(found(monkeypatch, answers), "auroc", "entropy", kind="all").mean() - 0.5) < 0.25


def test_levels_are_not_told_apart(monkeypatch):
    """Every other question of a kind is hard: the level tells wrong answers, and nothing within one level."""
    answers = drawn(120, told=0.0, by_heads=0.0, seed=4)
    rng = np.random.default_rng(0)
    for i, answer in enumerate(answers):
        hard = i // 2 % 2 == 1
        object.__setattr__(answer.question, "level", "hard" if hard else "easy")
        object.__setattr__(answer, "right", bool(rng.random() < (0.2 if hard else 0.8)))
    rows = found(monkeypatch, answers)
    told, within = (values(rows, "auroc", "level", kind=kind).mean() for kind in ("all", "one level"))
    assert told > 0.7 and within == nearly(0.5)


def test_thresholds(rows):
    risk, share = values(rows, "answered_risk", "both").mean(), values(rows, "answered", "both").mean()
    assert 0 < risk <= TASK.risk and share > 0.3
    assert values(rows, "answered", "random").mean() < 0.2 < share
    assert values(rows, "false_alarm", "both").mean() == pytest.approx(TASK.alarm, abs=0.08)
    kept = {rule: values(rows, "risk_kept", "random", rule=rule).mean() for rule in ("controlled", "plain")}
    assert kept["controlled"] >= 1 - TASK.delta > kept["plain"]
    assert not [row for row in rows if row.arm == "shuffled" and row.metric != "auroc"]


def test_bounds(rows):
    for form in ("kl", "mcallester", "rademacher"):
        assert values(rows, "bound_holds", "entropy", rule="chosen", form=form).mean() == 1
    made = {form: values(rows, "bound", "entropy", rule="chosen", form=form) for form in ("kl", "mcallester")}
    assert (made["kl"] < made["mcallester"]).all()
    exact = values(rows, "bound", "entropy", rule="fixed", form="clopper_pearson")
    assert (exact <= values(rows, "bound", "entropy", rule="fixed", form="kl")).all() and (exact > 0).all()


def test_a_model_that_is_always_wrong_is_refused(monkeypatch):
    with pytest.raises(UserError, match="nothing can be told"):
        found(monkeypatch, drawn(60, wrong=0.9))
    assert math.isclose(sum(unit.cost for unit in TASK.units(context(Arm("entropy")))), nearly(120.0).expected)
