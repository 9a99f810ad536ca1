# SPDX-License-Identifier: Apache-2.0
"""The task that has all arms write about the same pictures with the same weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import manyheads
import manyheads.writing
from manyheads.data import scenes
from manyheads.experiment import Arm
from manyheads.tasks.vision.object_captions import ObjectCaptions
from oracles import tasks
from tolerance import nearly

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
TASK = ObjectCaptions(dim=16, layers=2, grid=3, steps=2, batch=4, samples=4, own=1, calibration=1, most=5)
PLAIN, GATED = Arm("plain", "conscious_gaze:gate=never"), Arm("gated", "conscious_gaze:quantile=0.5,target=0.9")
RANDOM = Arm("random", "conscious_gaze:gate=random", options={"rate_of": "gated"})


@needs_data
def test_arms_are_paired_and_a_plain_twin_is_the_same():
    run = tasks.context(PLAIN, Arm("twin", "conscious_gaze:gate=random,rate=0"), GATED, RANDOM)
    TASK.guard(run)
    rows = tasks.rows(TASK, run)

    def named(arm, metrics=None):
        return [(r.metric, r.sample, tuple(sorted(r.at.items())), r.value if metrics else 0) for r in rows
                if r.arm == arm and r.metric not in ("training_nll", "token_seconds")]  # fmt: skip

    assert sorted(named("plain")) == sorted(named("gated")) == sorted(named("random"))
    assert named("plain", True) == named("twin", True)
    assert named("plain", True) != named("gated", True)
    both = [tasks.values(rows, name, "plain", pictures="decorrelated") for name in ("recall", "hallucinated")]
    assert sum(map(len, both)) == 8 * 4  # every object of every picture
    assert tasks.values(rows, "intervened", "plain").tolist() == [0] * 5
    assert 0 < tasks.values(rows, "intervened", "gated").mean() < 1
    assert tasks.values(rows, "forwards", "plain") == nearly(np.ones(5))
    gated = tasks.values(rows, "intervened", "gated")
    assert tasks.values(rows, "forwards", "gated") == nearly(1 + gated)


@needs_data
def test_a_caption_is_judged_by_what_the_picture_shows():
    run = tasks.context(PLAIN)
    vlm = TASK.fresh(run, 0)
    shown = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0]).bool()
    made = manyheads.writing.Written(vlm.language.encode("a apple and a sunflower ."), 7)
    rows = list(replace(TASK, most=40)._caption(PLAIN, vlm, shown, made, 1.4, 0, 3, "decorrelated"))
    assert tasks.values(rows, "recall").tolist() == [1, 0]
    assert tasks.values(rows, "hallucinated", friend=True).tolist() == [1]  # the sunflower beside an apple
    assert tasks.values(rows, "hallucinated", friend=False).tolist() == [0] * 5
    assert tasks.values(rows, "chair") == nearly([0.5]) and tasks.values(rows, "exact").tolist() == [0]
    assert tasks.values(rows, "token_seconds") == nearly([0.2])
    right = manyheads.writing.Written(vlm.language.encode("a apple and a heart"), 7)
    rows = list(replace(TASK, most=40)._caption(PLAIN, vlm, shown, right, 1.4, 0, 3, "decorrelated"))
    assert tasks.values(rows, "exact").tolist() == [1] and tasks.values(rows, "chair").tolist() == [0]


@needs_data
def test_pictures_that_are_judged_are_the_same_for_all_seeds_and_as_large_as_patches():
    run = tasks.context(PLAIN)
    vlm = TASK.fresh(run, 0)
    test, train = ([TASK._pictures(run, vlm, 2, part, seed, own=True) for seed in (0, 1)] for part in ("test", "train"))
    assert torch.equal(test[0][1], test[1][1]) and not torch.equal(train[0][1], train[1][1])
    assert test[0][1].shape[-1] == 3 * vlm.patch


def test_arms_that_write_nothing_are_refused():
    with pytest.raises(manyheads.UserError, match="does not choose"):
        TASK.guard(tasks.context(PLAIN, Arm("rings", "concentric_attention")))
    with pytest.raises(manyheads.UserError, match="has to stand before it"):
        TASK.guard(tasks.context(PLAIN, RANDOM, GATED))


@needs_data
def test_a_seed_is_trained_once_in_a_run(parts, tmp_path, monkeypatch):
    joined = {"model": "joined", "tower": parts[0], "text": parts[1], "pool": 6, "align": 2, "sharp": 2}
    task = replace(TASK, **joined)
    run = replace(tasks.context(PLAIN, Arm("twin", "conscious_gaze:gate=never"), seeds=(0, 1)), folder=tmp_path)
    trained, inner = [], ObjectCaptions._train
    monkeypatch.setattr(ObjectCaptions, "_train", lambda *given: trained.append(given[2]) or inner(*given))
    task.prepare(run)
    task.prepare(run)
    rows = tasks.rows(task, run)
    assert trained == [0, 1] and len(task.units(run)) == 4
    same = [[(r.seed, r.metric, r.value) for r in rows if r.arm == arm and r.metric in ("recall", "right", "forwards")]
            for arm in ("plain", "twin")]  # fmt: skip
    assert same[0] == same[1] and len(tasks.values(rows, "training_nll", "plain")) == 2
    replace(task, steps=3).prepare(run)  # control: another training
    assert trained == [0, 1, 0, 1]
    grouped = [unit.params["arms"] for unit in TASK.units(tasks.context(PLAIN, GATED, RANDOM))]
    assert grouped == [["plain"], ["gated", "random"]]
