# SPDX-License-Identifier: Apache-2.0
"""Boxes: overlap, one-to-one matching, losses of detectors, and average precision by pycocotools.

Boxes are edges (left, upper, right, lower) unless a name says centres (x and y of the centre, width, height).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import l1_loss

__all__ = [
    "average_precision", "edges", "focal", "generalised_iou", "intersection_over_union", "matched", "set_loss",
]  # fmt: skip

_CLASS, _DISTANCE, _OVERLAP = 2.0, 5.0, 2.0  # costs of a pair, as in Deformable DETR; of the losses the first is 1
_SMALLEST = 1e-9  # area, so that nothing is divided by 0


def edges(centres: Tensor) -> Tensor:
    """Boxes ``[..., 4]`` that are given by centre and extent."""
    centre, extent = centres.split(2, -1)
    return torch.cat((centre - extent / 2, centre + extent / 2), -1)


def _overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of all pairs ``[..., n, m]``."""
    low, high = (
        torch.maximum(one[..., :, None, :2], other[..., None, :, :2]),
        torch.minimum(one[..., :, None, 2:], other[..., None, :, 2:]),
    )
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return both, areas[0][..., :, None] + areas[1][..., None, :] - both


def intersection_over_union(one: Tensor, other: Tensor) -> Tensor:
    """Of all pairs of ``[..., n, 4]`` and ``[..., m, 4]``: ``[..., n, m]``."""
    both, either = _overlap(one, other)
    return both / either.clamp(min=_SMALLEST)


def generalised_iou(one: Tensor, other: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of all pairs, from -1 to 1: IoU less the share of the hull that neither covers."""
    both, either = _overlap(one, other)
    low, high = (
        torch.minimum(one[..., :, None, :2], other[..., None, :, :2]),
        torch.maximum(one[..., :, None, 2:], other[..., None, :, 2:]),
    )
    hull = (high - low).prod(-1).clamp(min=_SMALLEST)
    return both / either.clamp(min=_SMALLEST) - (hull - either) / hull


def focal(
    logits: Tensor, wanted: Tensor, gamma: float = 2.0, alpha: float = 0.25, weight: Tensor | float = 1.0
) -> Tensor:
    """Focal loss (arXiv 1708.02002) of each logit, for ``wanted`` from 0 to 1, of which 1 counts ``weight`` times."""
    p = logits.sigmoid()
    log_p, log_rest = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return -(weight * alpha * (1 - p) ** gamma * wanted * log_p + (1 - alpha) * p**gamma * (1 - wanted) * log_rest)


@torch.no_grad()
def matched(logits: Tensor, centres: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and objects of one image, one to one at the least cost: two index tensors as long as the fewer.

    Args:
        logits: of classes, ``[Q, C]``.
        centres: that are predicted, ``[Q, 4]``.
        labels, wanted: of the objects, ``[n]`` and ``[n, 4]``, centres too.
    """
    from scipy.optimize import linear_sum_assignment

    logits, centres, wanted = logits.float(), centres.float(), wanted.float()
    for_it, against = focal(logits, torch.ones_like(logits)), focal(logits, torch.zeros_like(logits))
    cost = _CLASS * (for_it - against)[:, labels]
    cost = cost + _DISTANCE * torch.cdist(centres, wanted, p=1)
    cost = cost - _OVERLAP * generalised_iou(edges(centres), edges(wanted))
    rows, columns = linear_sum_assignment(cost.cpu().nan_to_num(1e6).numpy())
    return torch.as_tensor(rows, device=logits.device), torch.as_tensor(columns, device=logits.device)


def set_loss(logits: Tensor, centres: Tensor, labels: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Focal loss of classes, distance and GIoU of matched boxes, over the number of objects in the batch.

    Args:
        logits, centres: ``[B, Q, C]`` and ``[B, Q, 4]``; a prediction whose logits are -inf is none.
        labels: ``[B, n]``, -1 where there is no object.
        wanted: centres, ``[B, n, 4]``.
        weights: of the loss of classes where they are there, ``[C]``; 1 without.
    """
    logits, centres = logits.float(), centres.float()
    real, said, meant, target = labels >= 0, [], [], torch.zeros_like(logits)
    for i, there in enumerate(real):
        rows, columns = matched(logits[i], centres[i], labels[i][there], wanted[i][there])
        target[i, rows, labels[i][there][columns]] = 1.0
        said.append(centres[i, rows])
        meant.append(wanted[i][there][columns])
    boxes, objects = torch.cat(said), torch.cat(meant)
    known = logits.isfinite()
    loss = (
        focal(logits.masked_fill(~known, 0.0), target, weight=1.0 if weights is None else weights)
        .masked_fill(~known, 0.0)
        .sum()
    )
    loss = loss + _DISTANCE * l1_loss(boxes, objects, reduction="sum")
    apart = 1 - generalised_iou(edges(boxes)[:, None], edges(objects)[:, None]).flatten()
    return (loss + _OVERLAP * apart.sum()) / real.sum().clamp(min=1)


def average_precision(
    wanted: Sequence[tuple[Tensor, Tensor]], said: Sequence[tuple[Tensor, Tensor, Tensor]], classes: int
) -> dict[str, NDArray[Any]]:
    """COCO's average precision as a value for each image, whose mean is that of all images.

    A value is the precision of all and what the image adds to its jackknife deviation, so that intervals over images
    are those of the jackknife. Classes of which no image has an object do not count.

    Args:
        wanted: edges ``[n, 4]`` and classes ``[n]`` of each image's objects.
        said: edges ``[k, 4]``, classes and scores ``[k]`` of its predictions; the best 100 count.
        classes: how many there are.

    Returns:
        ``ap50``, at an overlap of 0.5, and ``map``, the mean at 0.5, 0.55, ... 0.95; ``[N]`` each. NaN without objects.
        ``of_class``, the first of each class, ``[N, C]``; NaN where no image has an object of it.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    count = len(wanted)

    def table(kind: Sequence[Any]) -> COCO:
        held = COCO()
        rows: list[dict[str, Any]] = []
        for image, (boxes, labels, *scores) in enumerate(kind):
            for at, (x, y, right, lower) in enumerate(boxes.double().tolist()):
                rows.append({
                    "id": len(rows) + 1, "image_id": image, "category_id": int(labels[at]), "iscrowd": 0,
                    "bbox": [x, y, right - x, lower - y], "area": (right - x) * (lower - y),
                    **({"score": float(scores[0][at])} if scores else {}),
                })  # fmt: skip
        held.dataset = {
            "images": [{"id": i} for i in range(count)], "categories": [{"id": c} for c in range(classes)],
            "annotations": rows,
        }  # fmt: skip
        held.createIndex()
        return held

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        judge = COCOeval(table(wanted), table(said), "bbox")
        judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [[0, 1e10]], ["all"], [100]
        judge.evaluate()

        held = judge.evalImgs  # of each class all images in their order

        def found(left: int) -> NDArray[Any]:
            """AP at 0.5, the mean over overlaps, and AP of classes, of all images but one; of all with -1."""
            judge.evalImgs = [None if i % count == left else one for i, one in enumerate(held)]
            judge.accumulate()
            each = judge.eval["precision"][:, :, :, 0, 0]  # overlaps, recalls, classes; -1 where a class has no object
            each = np.where(each > -1, each, np.nan).mean(1)
            known = ~np.isnan(each[0])
            means = [each[0, known].mean(), each[:, known].mean()] if known.any() else [np.nan, np.nan]
            return np.array([*means, *each[0]])

        whole, without = found(-1), np.array([found(i) for i in range(count)])
    without = np.where(np.isnan(without), whole, without)  # of one image alone nothing is left
    values = whole + (count - 1) * (without.mean(0) - without)
    return {"ap50": values[:, 0], "map": values[:, 1], "of_class": values[:, 2:]}
