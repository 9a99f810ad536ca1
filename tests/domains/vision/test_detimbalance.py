# SPDX-License-Identifier: Apache-2.0
"""Rare classes: samplers by counts, repeat factors and weights by hand, mosaic, windows and mixup by pixels."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from manyheads.domains.vision.detimbalance import class_weights, mixed, mosaic, repeat_factors, viewed
from manyheads.recipe import Sample
from manyheads.spec import parse
from manyheads.tasks.vision._boxes import focal, matched, set_loss
from manyheads.tasks.vision._detection_task import Objects
from manyheads.tasks.vision.object_detection import ObjectDetection
from tolerance import CLOSE, is_close, is_far

PLAIN = "detimbalance:mosaic=0,mixup=0,jitter=false"
LABELS = [("a",), ("a", "a", "b"), ("a", "c"), ("a",), ("a", "b", "b", "b")]  # 6 a, 4 b, 1 c in 5, 2, 1 images


@pytest.fixture
def task():
    return ObjectDetection(dataset="planted", dim=16, layers=1, heads=2, batch=6, dropout=0.0, queries=80)


def image_of(height=12, width=16, boxes=((2.0, 3, 6, 8),), labels=("disc",), value=None, name="x", factor=1):
    pixels = torch.randint(0, 100, (3, height, width), dtype=torch.uint8)
    if value is not None:
        pixels = torch.full_like(pixels, value)
    target = Objects(factor * torch.tensor(boxes).reshape(-1, 4), labels)
    return Sample(name, name, "train", pixels, target, {"size": (factor * height, factor * width)})


def test_repeat_factors_are_their_formula():
    by_image = {"a": 1.0, "b": (5 / 2) ** 0.5, "c": 5**0.5}
    by_object = {"a": (11 / 6) ** 0.5, "b": (11 / 4) ** 0.5, "c": 11**0.5}
    for frequency, r in (("image", by_image), ("instance", by_object)):
        for reduce, merge in (("max", max), ("mean", np.mean)):
            wanted = [merge([r[name] for name in sorted(set(held))]) for held in LABELS]
            assert repeat_factors(LABELS, 1.0, frequency, reduce) == pytest.approx(wanted)
    half = repeat_factors(LABELS, 0.3)  # classes in 3 of 10 images or more are not repeated
    assert half == pytest.approx([1, 1, 1.5**0.5, 1, 1])
    assert repeat_factors([(), ("a",)], 1.0).tolist() == [1.0, 2**0.5]
    uniform = repeat_factors([("a", "b"), ("b", "a")], 1.0)
    assert uniform.tolist() == [1.0, 1.0]


def test_weights_times_counts_are_constant():
    weights = class_weights([4155, 372, 361])
    assert is_close(weights * torch.tensor([4155.0, 372, 361]), torch.tensor(4888.0), CLOSE)
    assert class_weights([3, 0]).tolist() == [1.0, 1.0]


def shares(recipe, samples, many=400, each=6):
    rng = np.random.default_rng(0)
    drawn = [s for _ in range(many) for s in recipe.drawn(rng, samples, each)]
    return Counter(s.name for s in drawn), drawn


def test_images_are_drawn_by_the_sampler():
    samples = [image_of(name=str(i), labels=held, boxes=((2.0, 3, 6, 8),) * len(held)) for i, held in enumerate(LABELS)]
    n = 2400
    counts, _ = shares(parse(PLAIN), samples)
    assert all(abs(counts[str(i)] / n - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5 for i in range(5))
    factors = repeat_factors(LABELS, 1.0, "instance", "mean")
    counts, _ = shares(parse(f"{PLAIN},sampler=repeat_factor,frequency=instance,reduce=mean"), samples)
    p = factors / factors.sum()
    assert all(abs(counts[str(i)] / n - p[i]) < 4 * (p[i] * (1 - p[i]) / n) ** 0.5 for i in range(5))
    assert abs(p[2] - 0.2) > 8 * (0.16 / n) ** 0.5  # control: it is not drawn as evenly
    counts, _ = shares(parse(f"{PLAIN},sampler=class_aware"), samples)
    wanted = [1 / 15, 1 / 15 + 1 / 6, 1 / 15 + 1 / 3, 1 / 15, 1 / 15 + 1 / 6]  # a class, and one of its images
    assert all(abs(counts[str(i)] / n - wanted[i]) < 4 * (wanted[i] * (1 - wanted[i]) / n) ** 0.5 for i in range(5))
    rng = np.random.default_rng(1)
    for _ in range(20):  # classes take turns: of six images two are drawn for each, for c the same one twice
        assert sum(s.name == "2" for s in parse(f"{PLAIN},sampler=class_aware").drawn(rng, samples, 6)) >= 2


def test_what_puts_nothing_together_draws_samples_as_they_are_or_mirrored(task):
    samples = task.samples("train")
    own = {s.inputs.numpy().tobytes() for s in samples} | {s.inputs.flip(2).numpy().tobytes() for s in samples}
    batch = parse(PLAIN).batches(task, np.random.default_rng(0), samples)
    back = ((batch["images"] * 0.25 + 0.5) * 255).round().to(torch.uint8)
    assert all(x.contiguous().numpy().tobytes() in own for x in back) and len(back) == 6
    windows = parse("detimbalance:mosaic=0,mixup=0").batches(task, np.random.default_rng(0), samples)
    seen = ((windows["images"] * 0.25 + 0.5) * 255).round().to(torch.uint8)
    assert not any(x.contiguous().numpy().tobytes() in own for x in seen)


def test_a_mosaic_has_four_images_around_a_point_with_their_boxes():
    four = [image_of(value=10 * (i + 1), labels=(str(i),)) for i in range(4)]
    made = mosaic(four, 12, 16, np.array([1.0, 1.0]))
    assert made.inputs.shape == (3, 24, 32) and made.about["size"] == (24, 32)
    for i, (row, column) in enumerate(itertools.product((0, 1), (0, 1))):
        assert (made.inputs[:, 12 * row : 12 * row + 12, 16 * column : 16 * column + 16] == 10 * (i + 1)).all()
        assert made.target.boxes[i].tolist() == [2 + 16 * column, 3 + 12 * row, 6 + 16 * column, 8 + 12 * row]
    assert made.target.labels == ("0", "1", "2", "3")
    moved = mosaic(four, 12, 16, np.array([0.5, 1.25]))  # they touch at (8, 15)
    assert (moved.inputs[:, :3] == 114).all() and (moved.inputs[:, 3:15, :8] == 10).all()
    assert (moved.inputs[:, 3:15, 8:24] == 20).all() and (moved.inputs[:, :, 24:] == 114).all()
    assert (moved.inputs[:, 15:24, :8] == 30).all()
    # of the first image's box, from -6 to -2 across, nothing is left
    assert moved.target.labels == ("1", "3")
    assert moved.target.boxes.tolist() == [[10, 6, 14, 11], [10, 18, 14, 23]]


def test_a_mosaic_takes_images_that_were_made_smaller_and_cuts_boxes():
    small = image_of(factor=4)  # 48 x 64 before: its box is the same in the image as it is stored
    made = mosaic([small] * 4, 12, 16, np.array([1.0, 1.0]))
    assert made.target.boxes[3].tolist() == [18, 15, 22, 20]
    wide = image_of(boxes=((0.0, 0, 16, 12), (0, 0, 3, 12)), labels=("big", "small"))
    cut = mosaic([wide] * 4, 12, 16, np.array([0.5, 1.0]))  # of the left ones the right half is left
    assert Counter(cut.target.labels) == {"big": 4, "small": 2}
    assert cut.target.boxes[0].tolist() == [0, 0, 8, 12]


def test_boxes_of_which_too_little_is_left_are_left_out():
    held = image_of(boxes=((0.0, 0, 16, 12), (5, 2, 9, 10), (4, 4, 5.5, 6)), labels=("big", "most", "thin"))
    seen = viewed(held, 12, 16, 1.0, np.array([-0.4, 0.0]))  # all moves 6 pixels to the left
    assert seen.target.labels == ("big", "most") and seen.target.boxes.tolist() == [[0, 0, 10, 12], [0, 2, 3, 10]]
    seen = viewed(held, 12, 16, 1.0, np.array([-0.95, 0.0]))  # and 15: a twentieth of the first box is left
    assert seen.target.labels == () and seen.target.boxes.shape == (0, 4)


def test_a_window_moves_and_scales_images_and_boxes_alike():
    held = image_of()
    same = viewed(held, 12, 16, 1.0, np.zeros(2))
    assert torch.equal(same.inputs, held.inputs) and torch.equal(same.target.boxes, held.target.boxes)
    moved = viewed(held, 12, 16, 1.0, np.array([-0.25, 0.25]))  # 4 pixels to the left, 3 down
    assert torch.equal(moved.inputs[:, 3:, :12], held.inputs[:, :9, 4:]) and (moved.inputs[:, :3] == 114).all()
    assert moved.target.labels == ()  # of the box 2 pixels are left
    right = viewed(held, 12, 16, 1.0, np.array([0.25, -0.25]))
    assert torch.equal(right.inputs[:, :9, 4:], held.inputs[:, 3:, :12])
    assert right.target.boxes.tolist() == [[6, 0, 10, 5]] and right.about["size"] == (12, 16)
    far = viewed(image_of(value=40, boxes=((0.0, 0, 8, 12),)), 12, 16, 0.5, np.zeros(2))  # half as large, with a rim
    assert far.target.boxes.tolist() == [[4, 3, 8, 9]]
    assert (far.inputs[:, :2] == 114).all() and (far.inputs[:, 4:8, 5:11] == 40).all()
    near = viewed(held, 12, 16, 2.0, np.zeros(2))  # the middle, from (4, 3) to (12, 9), twice as large
    assert near.target.boxes.tolist() == [[0, 0, 4, 10]]
    twice = mosaic([held] * 4, 12, 16, np.array([1.0, 1.0]))
    whole = viewed(twice, 12, 16, 0.5, np.zeros(2))
    assert whole.inputs.shape == (3, 12, 16) and not (whole.inputs == 114).all(0).any()


def test_mixup_lays_images_over_each_other_with_the_objects_of_both():
    one, other = image_of(value=40), image_of(value=80, boxes=((1.0, 1, 9, 9), (3, 3, 5, 5)), labels=("a", "b"))
    whole = mixed(one, other, 1.0)
    assert torch.equal(whole.inputs, one.inputs) and whole.target.labels == ("disc", "a", "b")
    assert torch.equal(whole.target.boxes, torch.cat((one.target.boxes, other.target.boxes)))
    assert (mixed(one, other, 0.25).inputs == 70).all()
    small = mixed(image_of(value=40, factor=2), image_of(height=8, value=80), 0.5)
    assert small.inputs.shape == (3, 12, 16) and (small.inputs[:, :8] == 60).all() and (small.inputs[:, 8:] == 77).all()
    assert small.target.boxes.tolist() == [[2, 3, 6, 8], [2, 3, 6, 8]]


def test_lambda_is_of_the_law_and_mixup_as_often_as_asked(task, monkeypatch):
    from manyheads.domains.vision import detimbalance

    drawn = []
    monkeypatch.setattr(detimbalance, "mixed", lambda one, other, share: drawn.append(share) or one)
    samples = task.samples("train")
    for i in range(40):
        parse(f"{PLAIN.replace('mixup=0', 'mixup=0.3')},beta=8").batches(task, np.random.default_rng(i), samples)
    assert abs(len(drawn) / 240 - 0.3) < 4 * (0.21 / 240) ** 0.5
    assert abs(np.mean(drawn) - 0.5) < 4 * (1 / 68 / len(drawn)) ** 0.5  # the variance of Beta(8, 8) is 1 / 68
    assert 0.5 / 68 < np.var(drawn) < 2 / 68


def test_labels_of_a_batch_are_those_of_what_is_drawn(task, monkeypatch):
    recipe, seen = parse("detimbalance:mixup=1,sampler=class_aware"), []
    draw = type(recipe).drawn
    monkeypatch.setattr(
        type(recipe), "drawn", lambda self, rng, samples, many: seen.append(many) or draw(self, rng, samples, many)
    )
    batch = recipe.batches(task, np.random.default_rng(0), task.samples("train"))
    assert seen.count(3) == 12 and seen.count(1) == 6 and seen[0] == 6  # partners come by the sampler too
    n = (batch["labels"] >= 0).sum(1)
    boxes = batch["boxes"][batch["labels"] >= 0]
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert n.max() > 5 and (low > -1e-6).all() and (high < 1 + 1e-6).all() and (boxes[:, 2:] > 0).all()
    again = recipe.batches(task, np.random.default_rng(0), task.samples("train"))
    assert torch.equal(batch["images"], again["images"])


def test_weights_are_on_the_loss_of_classes_where_they_are(task):
    samples = task.samples("train")
    counts = Counter(name for s in samples for name in s.target.labels)
    batch = task.collate(samples[:4])
    torch.manual_seed(0)
    model = task.reference(16)
    recipe = parse("detimbalance:loss_weights=true")
    got = recipe.loss(task, model, batch)
    weights = torch.tensor([counts.total() / counts[name] for name in task.classes])
    found = model(batch["images"], batch["extent"])
    wanted = torch.zeros(())
    for logits, centres in found.stages:
        wanted = wanted + set_loss(logits, centres, batch["labels"], batch["boxes"])
        for i in range(4):
            real = batch["labels"][i] >= 0
            labels = batch["labels"][i][real]
            rows, columns = matched(logits[i], centres[i], labels, batch["boxes"][i][real])
            each = focal(logits[i, rows, labels[columns]], torch.ones(len(rows)))
            wanted = wanted + ((weights[labels[columns]] - 1) * each).sum() / (batch["labels"] >= 0).sum()
    assert is_close(got, wanted)
    plain = parse("detimbalance").loss(task, model, batch)
    assert is_close(plain, task.loss(model, batch)) and is_far(plain, got)
    ones = task.criterion(found, batch, torch.ones(3))
    assert torch.equal(ones, task.criterion(found, batch))


def test_the_rarest_class_has_a_precision_of_its_own(task):
    counts = Counter(name for s in task.samples("train") for name in s.target.labels)
    assert counts[task.rarest] == min(counts.values()) and task.rarest != "disc"
    other = next(name for name in task.classes if name not in ("disc", task.rarest))
    samples = [
        image_of(120, 160, ((10.0, 10, 30, 30), (50, 50, 90, 90)), ("disc", task.rarest), name="a"),
        image_of(120, 160, ((10.0, 10, 30, 30),), (other,), name="b"),
    ]
    right = [task.truth(s) for s in samples]
    assert np.mean([one["rare_ap50"] for one in task.scores(samples, right)]) == pytest.approx(1.0)
    wrong = [type(right[0])(right[0].boxes, ("disc", other), right[0].scores), right[1]]
    found = task.scores(samples, wrong)
    assert np.mean([one["rare_ap50"] for one in found]) == pytest.approx(0.0)
    assert np.mean([one["ap50"] for one in found]) > 0.4
    assert task.score(samples[1], right[1])["rare_ap50"] == 1.0  # alone, without an object of it
    said = type(right[1])(right[1].boxes, (task.rarest,), right[1].scores)
    assert task.score(samples[1], said)["rare_ap50"] == 0.0
