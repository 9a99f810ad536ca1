# SPDX-License-Identifier: Apache-2.0
r"""Rare classes in object detection: samplers, weights of the loss, mosaic and mixup ("Class Imbalance in Object
Detection: An Experimental Diagnosis and Study of Mitigation Strategies", with the released code of its authors).

What a detector is trained on and by is changed, the detector is not:

    class_aware     classes take turns, an image is drawn of those that hold one of the class
    repeat_factor   image i is drawn as often as r_i, the largest or mean r_c = max(1, sqrt(t / f_c)) of its classes
    loss_weights    w_c = sum_k n_k / n_c, of n_c objects, on the loss of a class where it is there
    mosaic          four images around a point of a canvas of twice the size, seen through a window
    mixup           lambda a + (1 - lambda) b, lambda of Beta(b, b), with the objects of both

f_c is the share of images that hold the class (as the text has it) or of objects (as the code has it, with t = 1, so
that every class is repeated). Images drawn for a mosaic and for mixup are drawn by the same sampler: else they undo it.
``jitter`` moves and scales the window, which single images are seen through too. The paper's baseline is
``mosaic=1,mixup=0``; the defaults are what it found best.

Other than in the code: classes take turns within a batch, and images are drawn with replacement, for a step is to be
the same when a training goes on; the mean is over the classes of an image, not over its objects; colours are not
changed. The losses of boxes have no weights there either. The paper's set, COCO-ZIPF, and its detector, YOLOv5, are not
here: any task of detection will do.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from ...recipe import Batch, FieldTask, Recipe, Sample

__all__ = ["Detimbalance", "class_weights", "mixed", "mosaic", "repeat_factors", "viewed"]

Share = Annotated[float, Field(ge=0, le=1)]
_GREY = 114  # of what is beside images
_SCALE, _SHIFT = 0.5, 0.1  # of the window: how much larger or smaller things are, how far it moves
_LEAST_SIDE, _LEAST_AREA = 2.0, 0.1  # pixels, and share of a box that has to be left of it


@dataclass(frozen=True, kw_only=True)
class Detimbalance(Recipe):
    """Trains the task's detector on images that are drawn and put together for rare classes."""

    task: ClassVar[str] = "object_detection"

    sampler: Literal["uniform", "class_aware", "repeat_factor"] = field(
        default="uniform", metadata={"help": "how images are drawn"}
    )
    frequency: Literal["image", "instance"] = field(
        default="image", metadata={"help": "of repeat factors: share of images with a class, or of objects"}
    )
    reduce: Literal["max", "mean"] = field(
        default="max", metadata={"help": "of repeat factors: an image's, of those of its classes"}
    )
    threshold: Annotated[float, Field(gt=0)] = field(
        default=1.0, metadata={"help": "frequency below which a class is repeated, t"}
    )
    loss_weights: bool = field(default=False, metadata={"help": "the loss of a rare class weighs more where it is"})
    mosaic: Share = field(default=1.0, metadata={"help": "share of images that are put together of four"})
    mixup: Share = field(default=0.3, metadata={"help": "share of images that another is mixed into"})
    beta: Annotated[float, Field(gt=0)] = field(default=32.0, metadata={"help": "of the law of mixup's lambda"})
    jitter: bool = field(default=True, metadata={"help": "images are moved and scaled"})

    def batches(self, task: FieldTask, rng: np.random.Generator, samples: Sequence[Sample]) -> Batch:
        own: Any = task
        made = []
        for first in self.drawn(rng, samples, own.batch):
            one = self._image(own, rng, samples, first)
            if rng.random() < self.mixup:
                (second,) = self.drawn(rng, samples, 1)
                one = mixed(one, self._image(own, rng, samples, second), rng.beta(self.beta, self.beta))
            made.append(own.mirrored(one) if rng.random() < 0.5 else one)
        return task.collate(made)

    def drawn(self, rng: np.random.Generator, samples: Sequence[Sample], many: int) -> list[Sample]:
        """So many samples, by the sampler."""
        if self.sampler == "class_aware":
            holders = _holders(tuple(samples))
            turns = [name for _ in range(-(-many // len(holders))) for name in rng.permutation(sorted(holders))]
            return [samples[int(rng.choice(holders[name]))] for name in turns[:many]]
        odds = None
        if self.sampler == "repeat_factor":
            odds = _odds(tuple(samples), self.threshold, self.frequency, self.reduce)
        return [samples[int(i)] for i in rng.choice(len(samples), many, p=odds)]

    def _image(self, task: Any, rng: np.random.Generator, samples: Sequence[Sample], first: Sample) -> Sample:
        """A sample as it is seen, on a canvas of its own or as one of four."""
        height, across = task.height, task.across
        zoom = rng.uniform(1 - _SCALE, 1 + _SCALE) if self.jitter else 1.0
        shift = rng.uniform(-_SHIFT, _SHIFT, 2) if self.jitter else np.zeros(2)
        if rng.random() < self.mosaic:
            others = self.drawn(rng, samples, 3)
            whole = mosaic([first, *others], height, across, rng.uniform(0.5, 1.5, 2))
        else:
            if not self.jitter:
                return first
            whole = _placed(first, height, across)
        return viewed(whole, height, across, zoom, shift)

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        own: Any = task
        weights = None
        if self.loss_weights:
            counts = Counter(name for sample in task.samples("train") for name in sample.target.labels)
            weights = class_weights([counts[name] for name in own.classes]).to(batch["images"].device)
        made: Tensor = own.criterion(model(batch["images"], batch["extent"]), batch, weights)
        return made


@lru_cache(maxsize=8)
def _odds(samples: tuple[Sample, ...], threshold: float, frequency: str, reduce: str) -> NDArray[np.float64]:
    factors = repeat_factors([sample.target.labels for sample in samples], threshold, frequency, reduce)
    shares: NDArray[np.float64] = factors / factors.sum()
    return shares


@lru_cache(maxsize=8)
def _holders(samples: tuple[Sample, ...]) -> dict[str, list[int]]:
    """Places of the images that hold each class."""
    found: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        for name in set(sample.target.labels):
            found.setdefault(name, []).append(i)
    return found


def repeat_factors(
    labels: Sequence[Sequence[str]], threshold: float, frequency: str = "image", reduce: str = "max"
) -> NDArray[np.float64]:
    """How often each image is drawn, relative to one of frequent classes; of an image without objects 1.

    Args:
        labels: classes of each image's objects.
        threshold, frequency, reduce: see :class:`Detimbalance`.
    """
    counts = Counter(name for held in labels for name in (set(held) if frequency == "image" else held))
    total = len(labels) if frequency == "image" else counts.total()
    factors = {name: max(1.0, (threshold * total / count) ** 0.5) for name, count in counts.items()}
    merge = max if reduce == "max" else lambda some: sum(some) / len(some)
    return np.array([merge([factors[name] for name in set(held)]) if len(held) else 1.0 for held in labels])


def class_weights(counts: Sequence[int]) -> Tensor:
    """Weights of classes with so many objects, ``sum / count``; of a class without any 1."""
    return torch.tensor([sum(counts) / count if count else 1.0 for count in counts])


def _placed(sample: Sample, height: int, across: int) -> Sample:
    """On the canvas, at its upper left as a task has it; boxes in pixels of the canvas."""
    image = sample.inputs
    full = pad(image, (0, across - image.shape[2], 0, height - image.shape[1]), value=_GREY)
    return _made(sample, full, _boxes(sample), sample.target.labels)


def _boxes(sample: Sample) -> Tensor:
    """Of a sample in pixels of its image as it is stored, which may have been made smaller."""
    height, width = sample.about["size"]
    factor = torch.tensor([sample.inputs.shape[2] / width, sample.inputs.shape[1] / height])
    boxes: Tensor = sample.target.boxes * factor.repeat(2)
    return boxes


def _made(sample: Sample, image: Tensor, boxes: Tensor, labels: Sequence[str]) -> Sample:
    """Of another image and its objects."""
    return dataclasses.replace(
        sample, inputs=image, target=dataclasses.replace(sample.target, boxes=boxes, labels=tuple(labels)),
        about={**sample.about, "size": tuple(image.shape[1:])},
    )  # fmt: skip


def _cut(boxes: Tensor, labels: Sequence[str], whole: Tensor, width: float, height: float) -> tuple[Tensor, list[str]]:
    """Boxes cut off at the edges of a canvas, without those of which too little is left.

    Args:
        boxes: edges, ``[n, 4]``; labels of them.
        whole: areas of the boxes before anything was cut off, ``[n]``.
    """
    limits = torch.tensor([width, height, width, height])
    left = boxes.clamp(min=0).minimum(limits)
    sides = left[:, 2:] - left[:, :2]
    kept = (sides > _LEAST_SIDE).all(1) & (sides.prod(1) >= _LEAST_AREA * whole)
    return left[kept], [labels[i] for i in kept.nonzero().flatten().tolist()]


def mosaic(samples: Sequence[Sample], height: int, across: int, centre: NDArray[np.float64]) -> Sample:
    """Four images that touch in a point of a canvas of twice the size, cut off at its edges.

    Args:
        samples: upper left, upper right, lower left, lower right.
        height, across: of the task's canvas, in pixels.
        centre: where they touch, across and down, in canvases; from 0.5 to 1.5 as the paper has it.
    """
    x, y = round(centre[0] * across), round(centre[1] * height)
    full = samples[0].inputs.new_full((3, 2 * height, 2 * across), _GREY)
    boxes, labels = [], []
    for i, sample in enumerate(samples):
        _, rows, columns = sample.inputs.shape
        left, upper = (x if i % 2 else x - columns), (y if i // 2 else y - rows)
        low, right = min(2 * height, upper + rows), min(2 * across, left + columns)
        top, first = max(0, upper), max(0, left)
        full[:, top:low, first:right] = sample.inputs[:, top - upper : low - upper, first - left : right - left]
        own = _boxes(sample)
        areas = (own[:, 2:] - own[:, :2]).prod(1)
        moved = own + torch.tensor([left, upper, left, upper])
        kept, names = _cut(moved, sample.target.labels, areas, 2 * across, 2 * height)
        boxes.append(kept)
        labels += names
    return _made(samples[0], full, torch.cat(boxes), labels)


def viewed(sample: Sample, height: int, across: int, zoom: float, shift: NDArray[np.float64]) -> Sample:
    """A canvas through a window around its middle, in which things are ``zoom`` times as large.

    Args:
        sample: whose boxes are in pixels of its image.
        height, across: of what is seen, in pixels.
        shift: of the middle, across and down, in shares of what is seen.
    """
    rows, columns = sample.inputs.shape[1:]
    tall, wide = max(1, round(height / zoom)), max(1, round(across / zoom))
    left = round(columns / 2 - wide * (0.5 + float(shift[0])))
    upper = round(rows / 2 - tall * (0.5 + float(shift[1])))
    around = pad(sample.inputs, (wide, wide, tall, tall), value=_GREY)
    part = around[:, upper + tall : upper + 2 * tall, left + wide : left + 2 * wide]
    image = interpolate(part[None].float(), (height, across), mode="bilinear", antialias=True)[0]
    scale = torch.tensor([across / wide, height / tall]).repeat(2)
    start = torch.tensor([left, upper]).repeat(2)
    moved = (sample.target.boxes - start) * scale
    boxes, labels = _cut(moved, sample.target.labels, (moved[:, 2:] - moved[:, :2]).prod(1), across, height)
    return _made(sample, image.round().clamp(0, 255).to(torch.uint8), boxes, labels)


def mixed(one: Sample, other: Sample, share: float) -> Sample:
    """Images of one size laid over each other, ``share`` of the first, with the objects of both."""
    if one.inputs.shape != other.inputs.shape:  # one fills its canvas, the other does not
        height, across = (max(a, b) for a, b in zip(one.inputs.shape[1:], other.inputs.shape[1:], strict=True))
        one, other = _placed(one, height, across), _placed(other, height, across)
    image = (share * one.inputs.float() + (1 - share) * other.inputs.float()).round().to(torch.uint8)
    boxes = torch.cat((_boxes(one), _boxes(other)))
    return _made(one, image, boxes, [*one.target.labels, *other.target.labels])
