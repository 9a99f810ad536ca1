# SPDX-License-Identifier: Apache-2.0
"""Where objects are in a photograph, such as blood cells, and which they are: average precision on unseen images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...data.boxed_photographs import CLASSES, Boxed, blood_cells, planted, read_folder, read_image
from ...recipe import Part, Picture, Sample
from .._field import parted
from ._boxes import intersection_over_union
from ._detection_task import SURE, Detections, DetectionTask, Objects, fitted

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ObjectDetection"]

_PUBLIC = "public:"  # before the name of a set, so that it is no folder's


@dataclass(frozen=True, kw_only=True)
class ObjectDetection(DetectionTask):
    """``dataset`` is ``bccd`` (blood cells, in the parts that were published with them) or ``planted`` (made here).

    A training image is seen as it is or mirrored. See :class:`DetectionTask`.

    Attributes:
        dataset: public set, where there is no folder.
    """

    files: ClassVar[tuple[str, ...]] = ("bccd",)
    takes: ClassVar[str] = (
        "a folder as PASCAL VOC has it: Annotations/NAME.xml, JPEGImages/NAME.jpg or .png and, if images are parted "
        "already, ImageSets/Main/train.txt, val.txt and test.txt; three images or more"
    )

    label: str = ""
    dataset: Literal["bccd", "planted"] = "bccd"

    @property
    def source(self) -> str:
        return f"{self.height}x{self.across}:{self.folder or _PUBLIC + self.dataset}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of a model's logits."""
        if not self.folder:
            return CLASSES[self.dataset]
        parts: tuple[Part, ...] = ("train", "validation", "test")
        return _named(tuple(tuple(self.samples(part)) for part in parts))

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        """Images of a folder or of a public set, as ``HEIGHTxWIDTH:NAME``, brought to that canvas."""
        size, _, name = str(folder or f"120x160:{_PUBLIC}bccd").partition(":")
        height, across = map(int, size.split("x"))
        sets = {_PUBLIC + "bccd": blood_cells, _PUBLIC + "planted": planted}
        found = [_sample(one, height, across) for one in (sets[name]() if name in sets else read_folder(Path(name)))]
        if any(not sample.part for sample in found):
            home = parted([sample.group for sample in found])
            found = [dataclasses.replace(sample, part=home[sample.group]) for sample in found]
        return [found[i] for i in np.random.default_rng(0).permutation(len(found))]

    @classmethod
    def open(cls, path: Path) -> Sample:
        image = _tensor(read_image(path))
        return Sample(path.name, "", "test", image, about={"size": tuple(image.shape[1:])})

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        """As they are or mirrored."""
        return [self.mirrored(sample) if rng.random() < 0.5 else sample for sample in super().draw(rng, samples)]

    @staticmethod
    def mirrored(sample: Sample) -> Sample:
        """Left for right, with its objects."""
        width = sample.about["size"][1]
        left, upper, right, lower = sample.target.boxes.unbind(1)
        boxes = torch.stack((width - right, upper, width - left, lower), 1)
        objects = dataclasses.replace(sample.target, boxes=boxes)
        return dataclasses.replace(sample, inputs=sample.inputs.flip(2), target=objects)

    def illustrated(self, path: Path, said: Detections) -> Image:
        return _drawn(read_image(path), said, self.classes)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Detections]) -> Sequence[Picture]:
        """What objects are taken for: of those of a class, the shares that a sure prediction overlaps by half."""
        counts = {name: Counter[str]() for name in self.classes}
        for sample, one in zip(samples, said, strict=True):
            sure = [i for i, score in enumerate(one.scores.tolist()) if score >= SURE]
            overlap = intersection_over_union(sample.target.boxes, one.boxes[sure])
            for name, row in zip(sample.target.labels, overlap, strict=True):
                best = int(row.argmax()) if len(sure) else 0
                counts[name][one.labels[sure[best]] if len(sure) and row[best] >= 0.5 else "nothing"] += 1
        rows, columns = [name for name in self.classes if counts[name]], [*self.classes, "nothing"]
        values = [[counts[row][column] / counts[row].total() for column in columns] for row in rows]
        return (Picture("what objects are taken for", rows, columns, values, ("object", "taken for")),)


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _sample(one: Boxed, height: int, across: int) -> Sample:
    about = {"size": one.image.shape[:2]}
    objects = Objects(torch.from_numpy(one.boxes), one.labels)
    return Sample(one.name, one.name, one.part, fitted(_tensor(one.image), height, across), objects, about)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def _named(parts: tuple[tuple[Sample, ...], ...]) -> tuple[str, ...]:
    """Classes of the objects of samples, sorted."""
    return tuple(sorted({name for some in parts for sample in some for name in sample.target.labels}))


@lru_cache(maxsize=1)
def _colours() -> tuple[str, ...]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return tuple(to_hex(colour) for colour in colormaps["tab10"].colors)  # type: ignore[attr-defined]


def _drawn(image: Any, said: Detections, classes: Sequence[str]) -> Image:
    """The photograph with the boxes of what is sure, a colour a class, with names and scores."""
    from PIL import Image, ImageDraw

    made = Image.fromarray(image)
    pen = ImageDraw.Draw(made)
    for box, name, score in zip(said.boxes.tolist(), said.labels, said.scores.tolist(), strict=True):
        if score >= SURE:
            colour = _colours()[classes.index(name) % len(_colours())]
            pen.rectangle(box, outline=colour, width=max(1, min(made.size) // 240))
            words, corner = f"{name} {score:.2f}", (box[0] + 1, max(0.0, box[1] - 11))
            pen.rectangle(pen.textbbox(corner, words), fill=colour)
            pen.text(corner, words, fill="white")
    return made
