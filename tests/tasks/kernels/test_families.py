# SPDX-License-Identifier: Apache-2.0
"""The tasks that hold the cost model against operators: with times that are made up, what they say of them is known."""

import dataclasses
from math import inf

import pytest

from manyheads import claims
from manyheads.attention.mla import Platform, seconds
from manyheads.claims.efficient_attention_survey import CONTROLS, ROOFLINE
from manyheads.costs.clock import Clock
from manyheads.experiment import Experiment, run
from manyheads.tasks.kernels import family_times
from manyheads.tasks.kernels._operators import OPERATORS
from manyheads.tasks.kernels.family_counts import FamilyCounts
from manyheads.tasks.kernels.family_times import FamilyTimes
from tolerance import nearly

PLATFORM = Platform(3e10, 2e10, 1e-6, fused_heads=False)
SMALL = {"lengths": (256, 512, 1024), "held": (1024, 4096), "heads": 2, "channels": 16}


@pytest.fixture
def measured(monkeypatch):
    """Rows of the task where every time is ``times`` what the model says, and ``faster`` operators so much less."""
    monkeypatch.setattr(Clock, "calibrate", lambda self: PLATFORM)
    monkeypatch.setattr(Clock, "rates", lambda self: ())

    def made(folder, times: float, **faster: float):
        def best(self, clock, names, length):
            found = {}
            for name in names:
                stages = OPERATORS[name].stages(self._layer(name, length, clock), False)
                found[name] = times * seconds(stages, PLATFORM) / faster.get(name, 1.0)
            return found

        monkeypatch.setattr(family_times.FamilyTimes, "_best", best)
        arms = (ROOFLINE, *CONTROLS)
        plan = Experiment(subject="machine", arms=arms, baseline=ROOFLINE, tasks=(FamilyTimes(**SMALL),), equal="none")
        return run(dataclasses.replace(plan, seeds=1).at("cpu"), folder).rows

    return made


def of(rows, metric, arm="roofline"):
    return [row for row in rows if (row.metric, row.arm) == (metric, arm)]


def test_times_that_are_twice_the_models(measured, tmp_path):
    rows = measured(tmp_path, 2.0)
    reading, token = of(rows, "reading"), of(rows, "token")
    assert len(reading) == 9 * 3 and len(token) == 8 * 2
    assert all(row.value == nearly(1.0) for row in (*reading, *token))
    assert all(row.value == nearly(-1.0) for row in of(rows, "bias"))
    assert all(row.value == nearly(1.0) for row in of(rows, "rank"))
    assert all(row.value < 0.5 for row in of(rows, "crossover")) and of(rows, "crossover")
    for arm in ("FLOPs alone", "shuffled"):
        assert sum(row.value for row in of(rows, "reading", arm)) > 1.2 * sum(row.value for row in reading)
    assert min(row.value for row in of(rows, "rank", "shuffled")) < 0.9
    assert len(of(rows, "seconds")) == len(of(rows, "bias")) and not of(rows, "bias", "shuffled")


def test_an_operator_that_is_faster_than_predicted(measured, tmp_path):
    rows = measured(tmp_path, 1.0, window=8.0)
    wrong = {row.context: row.value for row in of(rows, "reading") if row.value > 1e-9}
    assert set(wrong) == {"window"} and wrong["window"] == nearly(3.0)
    assert min(row.value for row in of(rows, "rank")) < 1 - 1e-3


def test_parts_are_left_out():
    arms = {arm.name: arm for arm in CONTROLS}
    full = dataclasses.replace(PLATFORM, rates=((1.0, 1e9, 1e9), (2.0, 1e9, 1e9)))
    seen = {name: family_times._seen(full, arm) for name, arm in arms.items()}
    assert (seen["FLOPs alone"].bandwidth, seen["FLOPs alone"].rates) == (inf, ())
    assert seen["bytes alone"].peak_flops == inf and seen["bytes alone"].rates == full.rates
    assert seen["no launches"].overhead == 0 and seen["one bandwidth"] == PLATFORM
    assert seen["shuffled"] == family_times._seen(full, ROOFLINE) == full


def test_what_is_really_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(Clock, "calibrate", lambda self: PLATFORM)
    monkeypatch.setattr(Clock, "rates", lambda self: ())
    task = FamilyTimes(lengths=(256,), held=(1024,), channels=16, repeats=1)
    plan = Experiment(subject="machine", arms=(ROOFLINE,), baseline=ROOFLINE, tasks=(task,), equal="none", seeds=1)
    rows = run(plan.at("cpu"), tmp_path).rows
    assert {row.context for row in of(rows, "seconds")} == set(OPERATORS)
    assert all(0 < row.value < 10 for row in of(rows, "seconds"))


def test_counts_are_of_every_operator_and_family(monkeypatch):
    claim = claims.load("efficient_attention_survey")
    assert {task.name for task in claim.experiment.tasks} == {"family_counts", "family_times"}
    assert all(length > 512 for length in FamilyCounts().lengths)  # enough for codebooks, and for two windows
