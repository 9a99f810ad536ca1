# SPDX-License-Identifier: Apache-2.0
"""Schedules of latent attention: what an arm stands for, what a choice costs, and that no other model is timed."""

import pytest

from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, run
from manyheads.tasks.kernels.latent_decoding import LatentDecoding
from manyheads.tasks.kernels.latent_schedules import LatentSchedules
from tolerance import nearly

SIZES = (4, 32, 8, 4, 8, 16)
ARMS = (Arm("absorb", "mla_hw:schedule=absorb"), Arm("auto", "mla_hw"))


def rows(folder, *tasks, arms=ARMS):
    return run(Experiment(subject="machine", arms=arms, tasks=tasks, seeds=1).at("cpu"), folder).rows


def test_times_choices_and_regret_agree(tmp_path):
    task = LatentSchedules(sizes=SIZES, batches=(1,), queries=(1, 64), tokens=(64, 512), repeats=3)
    found = rows(tmp_path, task)
    best = {}
    for row in (row for row in found if row.metric == "attention"):
        key = row.sample.split(".")[0], row.arm
        best[key] = min(best.get(key, 1.0), row.value)
    value = {(row.metric, row.sample, row.arm): row.value for row in found if row.metric != "attention"}
    cells = {cell for cell, _ in best}
    assert len(cells) == 4
    for cell in cells:
        least = min(best[cell, "full"], best[cell, "absorb"])
        for arm in ("full", "absorb", "auto"):
            assert value["regret", cell, arm] == nearly(best[cell, arm] / least - 1)
            assert value["agrees", cell, arm] == (best[cell, arm] == least)
        assert value["agrees", cell, "full"] + value["agrees", cell, "absorb"] == 1
    assert {row.at["largest"] for row in found if row.at["tokens"] == 512} == {True}


def test_other_strategies_are_no_schedule(tmp_path):
    with pytest.raises(UserError, match="no schedule of latent attention"):
        rows(tmp_path, LatentSchedules(), arms=(Arm("snapkv", "snapkv"),))


def test_a_whole_model_decodes(tmp_path):
    task = LatentDecoding(sizes=SIZES, hidden=32, batch=2, context=64, repeats=2)
    found = rows(tmp_path, task)
    assert [row.arm for row in found] == ["full", "absorb", "auto"] * 2 and all(row.value > 0 for row in found)


def test_a_schedule_that_says_something_else_is_not_timed(tmp_path, monkeypatch):
    from manyheads.caches import mla_hw

    right = mla_hw.mla.absorb
    monkeypatch.setattr(mla_hw.mla, "absorb", lambda *a, **k: right(*a, **k) * 3 + 1)
    with pytest.raises(UserError, match="predicts otherwise"):
        rows(tmp_path, LatentDecoding(sizes=SIZES, hidden=32, batch=2, context=64, repeats=1))
