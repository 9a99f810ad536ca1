# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that detect objects: batches, the model, its losses, what is said of an image, and its scores."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Sample
from .._field import FieldTask
from ._boxes import average_precision, edges, focal, intersection_over_union, set_loss
from ._detector import BlockEncoder, Detector, Found, cells, shapes_of

__all__ = ["SURE", "DetectionTask", "Detections", "Objects", "fitted"]

SURE = 0.3  # score of what is named and drawn; those that are trained by focal loss are low
_BEST = 100  # predictions of an image
_MEAN, _DEVIATION = 0.5, 0.25  # of the values of pixels, roughly


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects of an image: left, upper, right and lower edges in its pixels, ``[n, 4]``, and their classes."""

    boxes: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Detections:
    """What a model says of an image, the surest first.

    Attributes:
        boxes: edges in pixels of the image, ``[k, 4]``.
        labels, scores: of them; scores are probabilities, ``[k]``.
        kept: tokens that its encoder refined, bool ``[N]``; empty where it is not said.
    """

    boxes: Tensor
    labels: tuple[str, ...]
    scores: Tensor
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def __str__(self) -> str:
        sure = [i for i, score in enumerate(self.scores.tolist()) if score >= SURE]
        many = ", ".join(f"{n} {name}" for name, n in Counter(self.labels[i] for i in sure).most_common())
        each = (
            f"{self.labels[i]} {float(self.scores[i]):.2f} ({', '.join(f'{x:.0f}' for x in self.boxes[i].tolist())})"
            for i in sure
        )
        return f"{many}: {'; '.join(each)}" if sure else "nothing"


@dataclass(frozen=True, kw_only=True)
class DetectionTask(FieldTask):
    """Images are ``inputs [3, h, w]`` uint8, ``about["size"]`` their height and width before they were made smaller; a
    ``target`` is :class:`Objects`.

    Images are brought to a canvas without changing their proportions, and judged in their own pixels. Precisions are
    those of COCO, of all images together; an image's value is the precision and what it adds to its jackknife
    deviation. The tokens of a model are judged by their centres: those that lie in a box, on any level, are foreground.

    Attributes:
        height, across: of the canvas, in pixels.
        stride: of the finest map, in pixels, a power of two.
        levels: maps, each of half the size of the one before.
        queries: predictions of a model; there should be more than objects in an image.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ap50", "AP at an overlap of 0.5", higher=True, what="average precision, mean over classes"),
        Metric("map", "mAP", higher=True, what="mean of the same at overlaps of 0.5, 0.55, ... 0.95"),
        Metric("rare_ap50", "AP of the rarest class", higher=True,
               what="at an overlap of 0.5, of the class with the fewest objects to train on"),
        Metric("foreground_recall", "foreground tokens that are refined", kind="share", higher=True,
               what="of tokens whose centres lie in a box, those that the encoder refines at least once"),
        Metric("best_overlap", "average best overlap", kind="share", higher=True,
               what="of each object the overlap of the prediction that fits best, of whatever class and score"),
    )  # fmt: skip
    references: ClassVar[tuple[str, ...]] = ("deformable_detr",)

    height: int = 120
    across: int = 160
    stride: int = 8
    levels: int = 4
    queries: int = 40
    dim: int = 64
    layers: int = 2
    batch: int = 8
    steps: int = 1000
    rates: tuple[float, ...] = (1e-3,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 2 or self.stride & (self.stride - 1) or min(self.levels, self.queries) < 1 or self.dim % 8:
            raise UserError("stride is a power of two, levels and queries count, 1 or more, and dim is a multiple of 8")

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of a model's logits."""

    @property
    def rarest(self) -> str:
        """The class of the fewest objects to train on."""
        counts = Counter(name for sample in self.samples("train") for name in sample.target.labels)
        return min(self.classes, key=lambda name: counts[name])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        images = torch.zeros(len(samples), 3, self.height, self.across)
        extent, pixels = torch.zeros(len(samples), 2), torch.zeros(len(samples), 2)
        for i, sample in enumerate(samples):
            image = fitted(sample.inputs, self.height, self.across)
            _, height, width = image.shape
            images[i, :, :height, :width] = (image / 255 - _MEAN) / _DEVIATION
            extent[i] = torch.tensor([width / self.across, height / self.height])
            pixels[i] = torch.tensor(sample.about["size"][::-1])
        batch = {"images": images, "extent": extent, "pixels": pixels}
        if any(sample.target is None for sample in samples):
            return batch
        most = max(1, *(len(sample.target.labels) for sample in samples))
        number = {name: i for i, name in enumerate(self.classes)}
        labels, boxes = torch.full((len(samples), most), -1), torch.zeros(len(samples), most, 4)
        for i, sample in enumerate(samples):
            n = len(sample.target.labels)
            labels[i, :n] = torch.tensor([number[name] for name in sample.target.labels], dtype=torch.long)
            placed = sample.target.boxes * (extent[i] / pixels[i]).repeat(2)
            boxes[i, :n] = torch.cat(((placed[:, :2] + placed[:, 2:]) / 2, placed[:, 2:] - placed[:, :2]), 1)
        return {**batch, "labels": labels, "boxes": boxes}

    def reference(self, width: int, kind: str = "") -> Detector:
        return Detector(
            self.dim, self.layers, self.heads, width, classes=len(self.classes), queries=self.queries,
            stride=self.stride, levels=self.levels, dropout=self.dropout,
        )  # fmt: skip

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        model = self.reference(2 * self.dim)
        model.encoder = BlockEncoder(blocks)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(model(batch["images"], batch["extent"]), batch)

    def criterion(self, found: Found, batch: Batch, weights: Tensor | None = None) -> Tensor:
        """Loss of what a detector said of a batch, summed over its stages; ``weights [C]`` are of classes."""
        losses = [set_loss(*stage, batch["labels"], batch["boxes"], weights) for stage in found.stages]
        return torch.stack(losses).sum()

    def token_loss(self, logits: Tensor, wanted: Tensor, there: Tensor) -> Tensor:
        """Focal loss of tokens ``[B, N]`` that are ``there``, over those that are ``wanted`` in an image; the mean."""
        each = focal(logits.float(), wanted.float()).masked_fill(~there, 0.0).sum(1)
        return (each / (wanted & there).sum(1).clamp(min=1)).mean()

    def predict(self, model: nn.Module, batch: Batch) -> list[Detections]:
        found: Found = model(batch["images"], batch["extent"])
        logits, boxes = found.stages[-1]
        scores, at = logits.sigmoid().flatten(1).topk(min(_BEST, logits[0].numel()))
        scale = (batch["pixels"] / batch["extent"]).repeat(1, 2)[:, None]
        own = edges(boxes).gather(1, (at // logits.shape[2])[..., None].expand(-1, -1, 4)) * scale
        own = torch.minimum(own.clamp(min=0), batch["pixels"].repeat(1, 2)[:, None]).cpu()
        classes = self.classes
        names = [tuple(classes[c] for c in row) for row in (at % logits.shape[2]).tolist()]
        return [Detections(own[i], names[i], scores[i].cpu(), found.encoded.kept[i].cpu()) for i in range(len(own))]

    def foreground(self, sample: Sample) -> Tensor:
        """Which tokens have their centres in a box, bool ``[N]``."""
        canvas = torch.tensor([self.across, self.height])
        _, height, width = fitted(sample.inputs, self.height, self.across).shape
        scale = torch.tensor(sample.about["size"][::-1]) / torch.tensor([width, height])
        points = cells(shapes_of(self.height, self.across, self.stride, self.levels)) * canvas * scale
        boxes = sample.target.boxes
        inside: Tensor = (points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])
        return inside.all(-1).any(-1)

    def score(self, sample: Sample, said: Detections) -> Mapping[str, float]:
        """Precisions of one image alone."""
        (found,) = self.scores([sample], [said])
        return found

    def scores(self, samples: Sequence[Sample], said: Sequence[Detections]) -> list[Mapping[str, float]]:
        number, rarest = {name: i for i, name in enumerate(self.classes)}, self.rarest

        def numbers(labels: Sequence[str]) -> Tensor:
            return torch.tensor([number[name] for name in labels], dtype=torch.long)

        precision = average_precision(
            [(sample.target.boxes, numbers(sample.target.labels)) for sample in samples],
            [(one.boxes, numbers(one.labels), one.scores) for one in said], len(number),
        )  # fmt: skip
        found: list[Mapping[str, float]] = []
        for i, (sample, one) in enumerate(zip(samples, said, strict=True)):
            values = {name: float(precision[name][i]) for name in ("ap50", "map") if np.isfinite(precision[name][i])}
            if np.isfinite(value := float(precision["of_class"][i, number[rarest]])):
                values["rare_ap50"] = value
            elif len(said) == 1:  # an image without one: whether none is said to be there
                sure = [name for name, score in zip(one.labels, one.scores.tolist(), strict=True) if score >= SURE]
                values["rare_ap50"] = float(rarest not in sure)
            if len(sample.target.labels):
                inside = self.foreground(sample)
                if len(one.kept) and inside.any():
                    values["foreground_recall"] = float(one.kept[inside].float().mean())
                overlap = intersection_over_union(sample.target.boxes, one.boxes)
                values["best_overlap"] = float(overlap.max(1).values.mean()) if len(one.boxes) else 0.0
            found.append(values)
        return found

    def truth(self, sample: Sample) -> Detections:
        objects = sample.target
        return Detections(objects.boxes, objects.labels, torch.ones(len(objects.labels)), self.foreground(sample))


def fitted(image: Tensor, height: int, across: int) -> Tensor:
    """An image uint8 ``[3, h, w]`` as large as fits on the canvas, in its own proportions."""
    scale = min(height / image.shape[1], across / image.shape[2])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    if size == list(image.shape[1:]):
        return image
    small = interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8)
