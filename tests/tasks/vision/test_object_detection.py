# SPDX-License-Identifier: Apache-2.0
"""Detection: canvases, mirrors, boxes there and back, stages of the detector, scores, folders, what is said, drawn."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from manyheads.attention.deformable import DeformableAttention
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.recipe import Sample
from manyheads.tasks.vision._boxes import set_loss
from manyheads.tasks.vision._detection_task import Detections, Objects
from manyheads.tasks.vision._detector import cells, shapes_of
from manyheads.tasks.vision.detector_cost import DetectorCost
from manyheads.tasks.vision.object_detection import ObjectDetection
from tolerance import SAME, is_close, is_far

THING = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def folder_of(place, names):
    """Photographs of 64 x 48 pixels of a cat and a dog, as PASCAL VOC has them."""
    for kind in ("Annotations", "JPEGImages"):
        (place / kind).mkdir(parents=True)
    for i, name in enumerate(names):
        things = THING.format("cat", 10, 20, 30 + i, 40) + THING.format("dog", 5, 0, 60, 12)
        (place / f"Annotations/{name}.xml").write_text(f"<annotation>{things}</annotation>")
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"JPEGImages/{name}.png")
    return place


@pytest.fixture
def task():
    return ObjectDetection(dataset="planted", dim=16, layers=2, heads=2, batch=3, dropout=0.0)


def image_of(height, width, boxes=((10.0, 20.0, 30.0, 40.0),), labels=("disc",), name="x"):
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return Sample(
        name, name, "test", pixels, Objects(torch.tensor(boxes).reshape(-1, 4), labels), {"size": (height, width)}
    )


def test_an_image_keeps_its_proportions_and_its_boxes_lie_where_they_did(task):
    wide, tall = image_of(60, 160), image_of(480, 320)
    batch = task.collate([wide, tall])
    assert batch["images"].shape == (2, 3, 120, 160)
    assert is_close(batch["extent"], torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert is_close(batch["images"][0, :, :60], (wide.inputs / 255 - 0.5) / 0.25)  # of its own size, not resampled
    assert not batch["images"][0, :, 60:].any() and not batch["images"][1, :, :, 80:].any()
    assert is_close(batch["boxes"][0, 0], torch.tensor([20 / 160, 30 / 120, 20 / 160, 20 / 120]))
    assert is_close(batch["boxes"][1, 0], torch.tensor([5 / 160, 7.5 / 120, 5 / 160, 5 / 120]))
    several = task.collate([wide, image_of(60, 160, ((1.0, 2, 3, 4), (5, 6, 7, 8)), ("square", "triangle"))])
    assert several["labels"].tolist() == [[0, -1], [1, 2]]
    assert "labels" not in task.collate([dataclasses.replace(wide, target=None)])


def test_predicted_boxes_are_in_pixels_of_the_image_itself(task):
    batch = task.collate([image_of(60, 160), image_of(480, 320)])

    class Sure(torch.nn.Module):
        """Says what is right, of class 1."""

        def forward(self, images, extent):
            logits = torch.full((2, 4, 3), -9.0)
            logits[:, 2, 1] = 9.0
            boxes = batch["boxes"].expand(-1, 4, -1)
            return dataclasses.replace(found, stages=[(logits, boxes)])

    found = task.reference(16).eval()(batch["images"], batch["extent"])
    said = task.predict(Sure(), batch)
    for one in said:
        assert one.labels[0] == "square" and one.scores[0] > 0.99 > 0.1 > one.scores[1]
        assert is_close(one.boxes[0], torch.tensor([10.0, 20, 30, 40]))


def test_half_of_the_images_are_mirrored_with_their_boxes(task):
    samples = task.samples("train")
    drawn = [s for i in range(20) for s in task.draw(np.random.default_rng(i), samples)]
    own = {sample.name: sample for sample in samples}
    turned = 0
    for sample in drawn:
        first = own[sample.name]
        if torch.equal(sample.inputs, first.inputs):
            assert torch.equal(sample.target.boxes, first.target.boxes)
            continue
        turned += 1
        assert torch.equal(sample.inputs.flip(2), first.inputs)
        left, upper, right, lower = sample.target.boxes[0].int().tolist()
        box = first.target.boxes[0].int().tolist()
        there = first.inputs[:, box[1] : box[3], box[0] : box[2]]
        assert torch.equal(sample.inputs[:, upper:lower, left:right].flip(2), there)
    assert 15 < turned < 45


def test_maps_are_halved_and_centres_are_of_cells():
    assert list(shapes_of(120, 160, 8, 4)) == [(15, 20), (8, 10), (4, 5), (2, 3)]
    assert cells([(1, 2), (2, 1)]).tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_a_detector_has_maps_as_the_task_counts_them_and_a_stage_for_each_layer(task):
    model = task.reference(16).eval()
    batch = task.collate(task.samples("test")[:2])
    found = model(batch["images"], batch["extent"])
    shapes = shapes_of(120, 160, 8, 4)
    assert [(h, w) for h, w in model.maps(batch["images"], batch["extent"]).shapes] == list(shapes)
    count = sum(h * w for h, w in shapes)
    assert [logits.shape for logits, _ in found.stages] == [(2, count, 3), (2, 40, 3), (2, 40, 3)]
    assert all(boxes.shape == (*logits.shape[:2], 4) for logits, boxes in found.stages)
    assert all(((boxes > 0) & (boxes < 1)).all() for _, boxes in found.stages)
    prior = torch.cat([logits.detach().flatten() for logits, _ in found.stages]).sigmoid()
    assert float((prior - 0.01).abs().median()) < 0.01
    first = found.stages[0][1][0]  # at first a token proposes a box around itself, four strides wide
    assert is_close(first[:, :2], cells(shapes).clamp(1e-4, 1 - 1e-4), 4 * SAME)
    assert is_close(first[0, 2:], torch.tensor([4 / 20, 4 / 15]), 4 * SAME)
    losses = [set_loss(*stage, batch["labels"], batch["boxes"]) for stage in found.stages]
    assert is_close(task.loss(model, batch), sum(losses)) and is_far(task.loss(model, batch), losses[-1])


def test_what_lies_beside_an_image_changes_nothing(task):
    model = task.reference(16).eval()
    batch = task.collate([image_of(60, 160), image_of(480, 320)])
    inside = batch["images"].clone()
    inside[0, :, 60:], inside[1, :, :, 80:] = 50.0, -50.0
    a, b = (model(images, batch["extent"]) for images in (batch["images"], inside))
    assert all(torch.equal(x, y) for one, other in zip(a.stages, b.stages, strict=True)
               for x, y in zip(one, other, strict=True))  # fmt: skip
    whole = model(inside, torch.ones(2, 2))  # control
    assert is_far(whole.stages[-1][1], a.stages[-1][1])
    beside = ~model.maps(batch["images"], batch["extent"]).there
    assert beside.any() and (a.stages[0][0][beside] == -torch.inf).all() and not a.encoded.kept[beside].any()


def test_blocks_take_the_place_of_the_encoder(task):
    class Doubled(torch.nn.Module):
        def forward(self, x, mask):
            assert mask.dtype == torch.bool and mask.shape == x.shape[:2]
            return 2 * x

    batch = task.collate(task.samples("test")[:2])
    found = task.around([Doubled()]).eval()(batch["images"], batch["extent"])
    assert found.encoded.kept.all() and not any(
        isinstance(part, DeformableAttention) for part in task.around([Doubled()]).encoder.modules()
    )


def test_foreground_is_where_centres_lie_in_boxes(task):
    sample = image_of(120, 160, ((16.0, 8.0, 32.0, 24.0),))
    inside = task.foreground(sample)
    fine = inside[:300].unflatten(0, (15, 20))
    assert torch.nonzero(fine).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert inside[300:380].unflatten(0, (8, 10)).sum() == 1  # cells of 15 and 16 pixels: one centre at (24, 22.5)
    double = image_of(240, 320, ((32.0, 16.0, 64.0, 48.0),))
    assert torch.equal(task.foreground(double), inside)


def test_scores_are_of_all_images_and_of_tokens(task):
    samples = [image_of(120, 160, name="a"), image_of(120, 160, ((50.0, 50.0, 70.0, 70.0),), ("square",), "b")]
    right = [task.truth(sample) for sample in samples]
    assert [set(one) for one in task.scores(samples, right)] == [{m.name for m in task.metrics}] * 2
    assert all(value == pytest.approx(1.0) for one in task.scores(samples, right) for value in one.values())
    inside = task.foreground(samples[0])
    part = inside.clone()
    part[torch.nonzero(inside)[0]] = False
    moved = Detections(torch.tensor([[10.0, 20, 30, 30]]), ("disc",), torch.tensor([0.9]), part)
    found = task.scores(samples, [moved, right[1]])
    assert found[0]["best_overlap"] == pytest.approx(0.5) and found[1]["best_overlap"] == pytest.approx(1.0)
    assert found[0]["foreground_recall"] == pytest.approx(1 - 1 / int(inside.sum()))
    assert np.mean([one["ap50"] for one in found]) == pytest.approx(1.0)
    assert np.mean([one["map"] for one in found]) == pytest.approx(0.55)
    bare = task.scores(samples, [dataclasses.replace(one, kept=torch.empty(0, dtype=torch.bool)) for one in right])
    assert all("foreground_recall" not in one for one in bare)


def test_what_is_said_and_drawn(task, tmp_path):
    said = Detections(
        torch.tensor([[10.0, 10, 40, 30], [50, 20, 80, 50], [0, 0, 5, 5]]), ("disc", "square", "disc"),
        torch.tensor([0.9, 0.6, 0.2]),
    )  # fmt: skip
    assert str(said) == "1 disc, 1 square: disc 0.90 (10, 10, 40, 30); square 0.60 (50, 20, 80, 50)"
    assert str(dataclasses.replace(said, scores=torch.full((3,), 0.1))) == "nothing"
    Image.new("RGB", (100, 60)).save(tmp_path / "dark.png")
    drawn = np.array(task.illustrated(tmp_path / "dark.png", said))
    assert drawn.shape == (60, 100, 3) and drawn[30, 20].any() and drawn[50, 60].any() and not drawn[20, 20].any()
    assert not drawn[0:5, 0:5].any()  # what is not sure is not drawn
    assert tuple(drawn[30, 20]) != tuple(drawn[50, 60])  # a colour a class
    (shown,) = task.pictures([image_of(60, 100, ((11.0, 10, 40, 30), (50, 20, 80, 50)), ("disc", "disc"))], [said])
    assert shown.rows == ["disc"] and list(shown.values[0]) == [0.5, 0.5, 0.0, 0.0]


def test_a_folder_of_ones_own_is_trained_and_predicted(tmp_path):
    task = ObjectDetection(folder=str(folder_of(tmp_path / "own", tuple("abcdef"))), dim=16, layers=1, heads=2)
    assert task.classes == ("cat", "dog")
    assert [len(task.samples(part)) for part in ("train", "validation", "test")] == [4, 1, 1]
    assert task.samples("train")[0].inputs.shape == (3, 120, 160)  # 64 x 48, brought to the canvas
    model = task.reference(16).eval()
    path = next((tmp_path / "own" / "JPEGImages").glob("b.*"))
    with torch.no_grad():
        (mine,) = task.predict(model, task.collate([task.open(path)]))
        (same,) = [s for part in ("train", "validation", "test") for s in task.samples(part) if s.name == "b"]
        (theirs,) = task.predict(model, task.collate([same]))
    assert torch.equal(mine.boxes, theirs.boxes) and torch.equal(mine.scores, theirs.scores)
    assert (mine.boxes[:, 2:] <= torch.tensor([64.0, 48.0])).all() and mine.boxes[:, 2].max() > 40


def test_sizes_that_cannot_be_are_refused():
    for fields in ({"stride": 6}, {"levels": 0}, {"queries": 0}, {"dim": 20}):
        with pytest.raises(UserError, match="power of two"):
            ObjectDetection(**fields)


def test_costs_are_counted_and_seconds_are_of_a_gpu():
    arms = (Arm("all", options={"reference": "deformable_detr"}), Arm("half", "focus_detr:objects=0"))
    run = RunContext(Trainable(), arms, device=torch.device("cpu"))
    task = DetectorCost(dim=16, layers=2, heads=2, width=64, height=96, across=128, images=1)
    rows = {(r.arm, r.metric): r.value for u in task.units(run) for r in task.measure(run, u)}
    tokens = sum(h * w for h, w in shapes_of(96, 128, 8, 4))
    points = 2 * 4 * 4
    layer = 16 * 16 * 2 + 16 * points * 3 + 2 * 16 * 64  # value, out, offsets and weights, feed-forward
    assert rows["all", "encoder"] == pytest.approx(2 * 2 * tokens * layer / 1e9)
    assert rows["half", "encoder"] < 0.8 * rows["all", "encoder"] < rows["all", "detector"]
    timed = dataclasses.replace(task, timed=True)
    assert "GPU" in timed.unsupported_reason(run) and task.unsupported_reason(run) is None
    with pytest.raises(UserError, match="count"):
        DetectorCost(images=0)
