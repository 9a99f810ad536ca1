# SPDX-License-Identifier: Apache-2.0
"""Segmentation of drawn pictures: labels and scores by hand, one training for all arms, and seconds."""

import pytest
import torch

from manyheads import UserError
from manyheads.data import scenes
from manyheads.data.object_scenes import draw_pictures, pixel_labels
from manyheads.experiment import Arm, Experiment, Sizes, run
from manyheads.tasks.vision.scene_segmentation import SceneSegmentation, mean_iou
from manyheads.tasks.vision.segmenter_cost import SegmenterCost

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
TINY = {"width": 8, "depth": 1}
ARMS = (
    Arm("hq", "segformer_pp:refuse=never"), Arm("off", "segformer_pp:ratio=0"),
    Arm("small", options={"downsampled": 0.5}),
)  # fmt: skip


def test_mean_iou_by_hand():
    labels = torch.tensor([[[0, 0, 1], [0, 2, 1]], [[0, 0, 0], [0, 0, 0]]])
    said = torch.tensor([[[0, 1, 1], [0, 3, 1]], [[0, 0, 0], [0, 0, 5]]])
    want = [(2 / 3 + 2 / 3 + 0) / 3, 5 / 6]  # 3 and 5, which are not there, count in no mean but against the others
    assert mean_iou(said, labels).tolist() == pytest.approx(want)
    assert mean_iou(labels, labels).tolist() == [1, 1]


@needs_data
def test_pixel_labels_are_where_the_objects_are():
    picture = draw_pictures(3, torch.Generator().manual_seed(0), grid=3, size=14)
    labels = pixel_labels(picture, 3, 14)
    assert labels.shape == (3, 42, 42)
    covers = scenes.sprites(14)[:, 3] > 0.5
    for n in range(3):
        want = torch.zeros(42, 42, dtype=torch.long)
        for kind, cell in enumerate(picture.cells[n].tolist()):
            if cell >= 0:
                at = (cell // 3 * 14, cell % 3 * 14)
                want[at[0] : at[0] + 14, at[1] : at[1] + 14] = covers[kind] * (kind + 1)
        assert torch.equal(labels[n], want)
    assert len(labels.unique()) > 4


@needs_data
def test_one_training_and_every_arm_on_its_weights(tmp_path):
    task = SceneSegmentation(**TINY, grid=3, cell=32, batch=2, steps=2, samples=3, at_once=2)
    rows = run(Experiment(subject="trainable", arms=ARMS, tasks=(task,), seeds=1).at("cpu"), tmp_path).rows
    values = {(r.arm, r.sample): r.value for r in rows if r.metric == "iou"}
    assert len(values) == 4 * 3 and len(rows) == 13
    assert all(values["off", f"0.{i}"] == values["full", f"0.{i}"] for i in range(3))
    assert all(0 <= value <= 1 for value in values.values())


def test_seconds_and_what_is_refused(tmp_path):
    task = SegmenterCost(**TINY, height=64, across=96, rounds=2)
    rows = run(Experiment(subject="trainable", arms=ARMS, tasks=(task,), seeds=1).at("cpu"), tmp_path / "a").rows
    assert len(rows) == 8 and all(row.value > 0 for row in rows)
    for arms, given, says in (
        (ARMS, {"device": "cuda"}, "seconds are compared on cuda alone"),
        ((Arm("other", "massive_values"),), {}, "massive_values is none"),
    ):
        task = SegmenterCost(**TINY, height=64, across=96, rounds=1, **given)
        with pytest.raises(UserError, match=says):
            run(Experiment(subject="trainable", arms=arms, tasks=(task,)).at("cpu"), tmp_path / "b")


@needs_data
def test_a_model_learns_what_is_asked(tmp_path):
    """Fewer classes are confused after more steps: the loss falls."""
    losses = []
    for steps in (1, 30):
        task = SceneSegmentation(**TINY, grid=3, cell=32, batch=4, steps=steps, samples=1)
        plan = Experiment(subject="trainable", arms=(), tasks=(task,), seeds=1, sizes=Sizes()).at("cpu")
        rows = run(plan, tmp_path / f"{steps}").rows
        losses.append(next(row.value for row in rows if row.metric == "training_loss"))
    assert losses[1] < 0.7 * losses[0]
