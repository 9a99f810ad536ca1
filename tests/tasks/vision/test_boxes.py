# SPDX-License-Identifier: Apache-2.0
"""Boxes: overlap by counting pixels, matching beside all permutations, losses by hand, precision of known cases."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers.loss.loss_for_object_detection import generalized_box_iou, sigmoid_focal_loss

from manyheads.tasks.vision._boxes import (
    average_precision,
    edges,
    focal,
    generalised_iou,
    intersection_over_union,
    matched,
    set_loss,
)
from tolerance import CLOSE, FORMULA, SAME, is_close, is_far


def boxes(count, side=20, seed=0):
    """Edges that are whole numbers."""
    rng = torch.Generator().manual_seed(seed)
    low = torch.randint(0, side - 4, (count, 2), generator=rng)
    return torch.cat((low, low + torch.randint(1, 5, (count, 2), generator=rng)), 1).double()


def covered(box, side=24):
    left, upper, right, lower = (int(x) for x in box)
    grid = np.zeros((side, side), bool)
    grid[upper:lower, left:right] = True
    return grid


def test_overlaps_are_those_of_counted_pixels():
    one, other = boxes(12, 12), boxes(9, 12, 1)
    iou, giou = intersection_over_union(one, other), generalised_iou(one, other)
    for i, j in itertools.product(range(12), range(9)):
        a, b = covered(one[i]), covered(other[j])
        both, either = (a & b).sum(), (a | b).sum()
        low, high = torch.minimum(one[i, :2], other[j, :2]), torch.maximum(one[i, 2:], other[j, 2:])
        hull = covered(torch.cat((low, high))).sum()
        assert abs(iou[i, j] - both / either) < 1e-12
        assert abs(giou[i, j] - (both / either - (hull - either) / hull)) < 1e-12
    assert (iou > 0).any() and (iou == 0).any() and giou.min() < 0


def test_generalised_iou_is_that_of_transformers_and_has_a_gradient_apart():
    one, other = boxes(7), boxes(5, seed=2)
    assert is_close(generalised_iou(one, other), generalized_box_iou(one, other), FORMULA)
    a, b = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True), torch.tensor([[3.0, 0, 4, 1]])
    generalised_iou(a, b).sum().backward()
    assert a.grad is not None and float(a.grad[0, 2]) > 0 and float(intersection_over_union(a, b).detach()) == 0
    same = intersection_over_union(one, one).diagonal()
    assert is_close(same, torch.ones(7, dtype=torch.float64)) and is_close(generalised_iou(one, one).diagonal(), same)


def test_centres_and_edges():
    assert edges(torch.tensor([0.5, 0.4, 0.2, 0.4])).tolist() == pytest.approx([0.4, 0.2, 0.6, 0.6])


def test_focal_loss_is_that_of_transformers_and_falls_to_0():
    logits, wanted = torch.randn(2, 6, dtype=torch.float64), (torch.rand(2, 6) < 0.3).double()
    theirs = sigmoid_focal_loss(logits, wanted, 1, 0.25, 2)  # the mean over the second axis, summed
    assert is_close(focal(logits, wanted).mean(1).sum(), theirs, 4 * FORMULA)
    sure = torch.where(wanted > 0, 40.0, -40.0)
    assert float(focal(sure, wanted).sum()) < 1e-12 < float(focal(-sure, wanted).sum())


def test_a_match_is_the_best_of_all():
    logits, centres = torch.randn(5, 3), torch.rand(5, 4) * 0.4 + 0.3
    labels, wanted = torch.tensor([2, 0, 2]), torch.rand(3, 4) * 0.4 + 0.3
    rows, columns = matched(logits, centres, labels, wanted)
    p = logits.sigmoid()

    def cost(q, n):
        c = labels[n]
        kind = 0.25 * (1 - p[q, c]) ** 2 * -p[q, c].log() - 0.75 * p[q, c] ** 2 * -(1 - p[q, c]).log()
        far = (centres[q] - wanted[n]).abs().sum()
        giou = generalised_iou(edges(centres[q])[None], edges(wanted[n])[None])[0, 0]
        return float(2 * kind + 5 * far - 2 * giou)

    def total(pairs):
        return sum(cost(q, n) for q, n in pairs)

    every = {qs: total(zip(qs, range(3), strict=True)) for qs in itertools.permutations(range(5), 3)}
    found = total(zip(rows.tolist(), columns.tolist(), strict=True))
    assert abs(found - min(every.values())) < 1e-4 and max(every.values()) > found + 0.1
    few = matched(logits[:2], centres[:2], labels, wanted)
    assert len(few[0]) == 2 and matched(logits, centres, labels[:0], wanted[:0])[0].tolist() == []


def test_the_loss_of_a_set_is_its_formula():
    logits, centres = torch.randn(2, 6, 3), torch.rand(2, 6, 4) * 0.4 + 0.3
    labels, wanted = torch.tensor([[1, 0, -1], [2, -1, -1]]), torch.rand(2, 3, 4) * 0.4 + 0.3
    total = torch.zeros(())
    for i, n in ((0, 2), (1, 1)):
        rows, columns = matched(logits[i], centres[i], labels[i, :n], wanted[i, :n])
        target = torch.zeros(6, 3)
        for q, j in zip(rows.tolist(), columns.tolist(), strict=True):
            target[q, labels[i, j]] = 1
            giou = generalised_iou(edges(centres[i, q])[None], edges(wanted[i, j])[None])[0, 0]
            total = total + 5 * (centres[i, q] - wanted[i, j]).abs().sum() + 2 * (1 - giou)
        total = total + focal(logits[i], target).sum()
    got = set_loss(logits, centres, labels, wanted)
    assert is_close(got, total / 3, SAME)
    other = wanted.clone()
    other[labels < 0] = 0.9  # what is no object changes nothing
    assert torch.equal(got, set_loss(logits, centres, labels, other))
    away = logits.clone()
    away[:, 5] = -math.inf  # nor does a token beside the image, unless it is matched
    assert set_loss(away, centres, labels, wanted).isfinite()
    none = set_loss(logits, centres, torch.full((2, 3), -1), wanted)
    assert is_close(none, focal(logits, torch.zeros_like(logits)).sum(), CLOSE)


def table(images):
    """Boxes, classes and scores of images from lists."""
    return [
        (torch.tensor([b for b, *_ in some], dtype=torch.float).reshape(-1, 4), torch.tensor([c for _, c, *_ in some]),
         *([torch.tensor([s[2] for s in some])] if some and len(some[0]) > 2 else [torch.zeros(0)] if not some else []))
        for some in images
    ]  # fmt: skip


BOX = [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)]


def test_average_precision_of_known_cases():
    wanted = table([[(BOX[0], 0), (BOX[1], 1)], [(BOX[2], 0)]])
    perfect = table([[(BOX[0], 0, 0.9), (BOX[1], 1, 0.8)], [(BOX[2], 0, 0.7)]])
    found = average_precision(wanted, perfect, 2)
    assert found["ap50"].mean() == pytest.approx(1.0) and found["map"].mean() == pytest.approx(1.0)
    twice = table([[(BOX[0], 0, 0.9), (BOX[0], 0, 0.85), (BOX[1], 1, 0.8)], [(BOX[2], 0, 0.7)]])
    # class 0: right, wrong, right: precision 1 up to a recall of 1/2 (51 of 101 points), 2/3 beyond
    want = ((51 + 50 * 2 / 3) / 101 + 1) / 2
    assert average_precision(wanted, twice, 2)["ap50"].mean() == pytest.approx(want, abs=1e-6)
    swapped = table([[(BOX[0], 1, 0.9), (BOX[1], 0, 0.8)], []])
    assert average_precision(wanted, swapped, 2)["ap50"].mean() == pytest.approx(0.0)
    near = (0.0, 0.0, 10.0, 7.2)  # an overlap of 0.72: at 0.5 to 0.7, five of ten
    half = average_precision(table([[(BOX[0], 0)]]), table([[(near, 0, 0.9)]]), 3)
    assert half["ap50"][0] == pytest.approx(1.0) and half["map"][0] == pytest.approx(0.5)
    assert np.isnan(average_precision(table([[]]), perfect[:1], 2)["ap50"]).all()


def test_values_of_images_have_the_mean_of_all_and_the_deviation_of_the_jackknife():
    rng = torch.Generator().manual_seed(3)
    wanted, said = [], []
    for i in range(6):
        some = boxes(5, 40, i).float()
        moved = some + (torch.rand(some.shape, generator=rng) - 0.5)
        labels = torch.randint(0, 2, (5,), generator=rng)
        wanted.append((some, labels))
        wrong = torch.where(torch.rand(5, generator=rng) < 0.3, 1 - labels, labels)
        said.append((moved, wrong, torch.rand(5, generator=rng)))

    def alone(keep):
        got = average_precision([wanted[i] for i in keep], [said[i] for i in keep], 2)
        return float(got["ap50"].mean())

    found = average_precision(wanted, said, 2)["ap50"]
    left = np.array([alone([j for j in range(6) if j != i]) for i in range(6)])
    assert found.mean() == pytest.approx(alone(range(6))) and 0.05 < found.mean() < 0.95
    assert found.var(ddof=1) / 6 == pytest.approx(5 / 6 * ((left - left.mean()) ** 2).sum())
    assert is_far(torch.tensor(found), torch.tensor(found.mean()))
