# SPDX-License-Identifier: Apache-2.0
"""Tasks that train a model that reads images: what they say of answers, and arms on equal terms."""

import pytest
import torch

import manyheads
from manyheads.data import scenes
from manyheads.data.visual_questions import Questions
from manyheads.experiment import Arm
from manyheads.tasks.vision.frame_order import FrameOrder
from manyheads.tasks.vision.object_presence import ObjectPresence
from manyheads.tasks.vision.unlearning import UnlearningTask
from oracles import tasks
from tolerance import nearly

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
TINY = {"dim": 16, "layers": 1, "heads": 2, "grid": 3, "steps": 3, "batch": 2, "samples": 6, "asked": 3, "filler": 2}
RASTER = Arm("raster", "concentric_attention:positions=raster,mask=raster")
RINGS = Arm("rings", "concentric_attention")


@needs_data
def test_arms_start_alike_and_read_the_same():
    task = ObjectPresence(**TINY, times=(1, 2))
    run = tasks.context(RASTER, RINGS, Arm("plain"), seeds=(0, 1))
    task.guard(run)
    rows = tasks.rows(task, run)
    for metric, count in (("right", 36), ("said_yes", 36), ("f1", 2), ("half_gap", 2), ("training_nll", 1)):
        assert len(tasks.values(rows, metric, "rings")) == 2 * count, metric
    named = {(row.metric, row.sample, row.seed, tuple(row.at.items())) for row in rows if row.arm == "raster"}
    assert named == {(row.metric, row.sample, row.seed, tuple(row.at.items())) for row in rows if row.arm == "rings"}
    raster, plain, rings = (tasks.values(rows, "training_nll", arm) for arm in ("raster", "plain", "rings"))
    assert raster == nearly(plain, torch.float32, 4096)
    assert (abs(rings - plain) > 1e-4).all() and raster[0] != raster[1]


@needs_data
def test_orders_of_frames_are_judged_by_their_distance():
    task = FrameOrder(**TINY, frames=3)
    rows = tasks.rows(task, tasks.context(Arm("plain"), Arm("tc", "tc_llava")))
    apart = [row.at["apart"] for row in rows if row.metric == "ordered" and row.arm == "tc"]
    assert len(apart) == 18 and set(apart) <= {1, 2}
    assert list(tasks.values(rows, "ordered", "tc")) == list(tasks.values(rows, "right", "tc"))


def test_what_is_seen_and_made_up_is_told_by_half():
    truth = torch.tensor([[True, True, False], [True, False, False]])
    cells = torch.tensor([[0, 3, -1], [2, -1, -1]])  # of 2 x 2: upper, lower; lower
    yes = torch.tensor([[True, False, True], [True, False, False]])
    blank = torch.zeros(0)
    task = ObjectPresence(**{**TINY, "grid": 2})
    rows = list(task.judged(RASTER, 0, 1, Questions(blank, blank, blank, blank, truth, cells), yes))
    assert list(tasks.values(rows, "hallucinated")) == [1, 0, 0]
    assert list(tasks.values(rows, "seen", None, half="upper")) == [1]
    assert list(tasks.values(rows, "seen", None, half="lower")) == [0, 1]
    assert list(tasks.values(rows, "half_gap")) == nearly([0.5])
    turned = list(
        ObjectPresence(**TINY).judged(RASTER, 0, 1, Questions(blank, blank, blank, blank, ~truth, cells), yes)
    )
    assert list(tasks.values(turned, "hallucinated")) == [1, 0, 1]  # control


@needs_data
def test_arms_that_mean_nothing_are_refused():
    task = ObjectPresence(**TINY)
    with pytest.raises(manyheads.UserError, match="the baseline rings changes"):
        task.guard(tasks.context(RINGS, RASTER))
    with pytest.raises(manyheads.UserError, match="does not act"):
        task.guard(tasks.context(RASTER, Arm("linear", "tnl_lightning")))


@needs_data
def test_a_joined_model_is_trained_on_a_pool_from_one_aligned_start(parts, monkeypatch):
    joined = {**TINY, "model": "joined", "tower": parts[0], "text": parts[1], "pool": 6, "align": 2, "steps": 5}
    task = ObjectPresence(**joined)
    run = tasks.context(RASTER, RINGS, Arm("plain"))
    task.guard(run)
    begun = []
    monkeypatch.setattr(type(task), "_trained", noting(begun, type(task)._trained))
    rows = tasks.rows(task, run)
    assert len(begun) == 3 and all(torch.equal(first, begun[0]) for first in begun)
    raster, plain, rings = (tasks.values(rows, "training_nll", arm) for arm in ("raster", "plain", "rings"))
    assert raster == nearly(plain, torch.float32, 4096) and abs(rings - plain) > 1e-6
    drawn = tasks.context(RASTER)
    other = ObjectPresence(**{**joined, "align": 0})
    assert not torch.equal(projector(other.fresh(drawn, 0)), begun[0])  # control
    assert not torch.equal(projector(task.fresh(run, 1)), begun[0])
    films = FrameOrder(**{**joined, "frames": 2})
    found = tasks.rows(films, tasks.context(Arm("plain"), Arm("tc", "tc_llava")))
    assert len(tasks.values(found, "ordered", "tc")) == 18


@needs_data
def test_what_pictures_show_stands_where_it_is_said_to_be():
    for task in (ObjectPresence(**TINY), FrameOrder(**{**TINY, "frames": 3})):
        vlm = task.fresh(tasks.context(RASTER), 0)
        images, cells, grid, cell = task.pictures(vlm, 2, torch.Generator().manual_seed(0))
        assert len(images) == len(cells) and cells.shape[1] == 8 and (cells >= 0).any() and cells.max() < grid * grid
        side = images.shape[-1] // grid
        there = {int(x) for x in cells[0] if x >= 0}
        blank = images[0].unfold(1, side, side).unfold(2, side, side).flatten(1, 2).std((0, 2, 3))
        assert cell * vlm.patch == side and len(blank) == grid * grid
        assert max(blank[i] for i in there) > blank.mean()  # an emoji is no smooth photograph
    with pytest.raises(manyheads.UserError, match="leave align away"):
        UnlearningTask().pictures(vlm, 1, torch.Generator())


def projector(vlm):
    return torch.cat([p.detach().flatten() for p in vlm.model.model.multi_modal_projector.parameters()])


def noting(begun, inner):
    def trained(self, run, arm, vlm, seed):
        begun.append(projector(vlm))
        return inner(self, run, arm, vlm, seed)

    return trained
