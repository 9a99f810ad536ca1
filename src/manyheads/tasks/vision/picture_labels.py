# SPDX-License-Identifier: Apache-2.0
"""Pictures by what they show, told by classifiers that are trained from scratch: accuracy and loss of unseen ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ...data import photograph_classes
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Part, Picture, Sample
from .._field import MODEL_METRICS, FieldTask
from .._folds import by_hash
from ._picture_models import InvertedBlock, PatchModel, ResidualBlock, StagedCNN

__all__ = ["Label", "PictureLabels"]

_KINDS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_NAMED = 3  # classes that a prediction names
_VALIDATION = 200  # photographs of a class


@dataclass(frozen=True, eq=False)
class Label:
    """What a model says of a picture.

    Attributes:
        log_probs: float32 ``[classes]``.
        classes: names.
    """

    log_probs: Tensor
    classes: tuple[str, ...]

    def __str__(self) -> str:
        first = self.log_probs.argsort(descending=True)[:_NAMED].tolist()
        return ", ".join(f"{self.classes[k]} {float(self.log_probs[k].exp()):.3f}" for k in first)


@dataclass(frozen=True, kw_only=True)
class PictureLabels(FieldTask):
    """CIFAR-10: of each class 1,800 photographs train, 200 validate, and of its own test part 500 are there.

    ``inputs`` are uint8 ``[3, H, W]``, in a batch float32 in -1..1; ``target`` is the name of a class. A picture is a
    group of its own: pictures that show the same thing may be in two parts.

    Attributes:
        pixels: sides that pictures are brought to; 0 leaves them, and all of a batch have one size then.
        patch: pixels of the side of what the first layer of every model makes one place of.
        augment: training pictures are mirrored, half of them, and moved by up to an eighth, edges repeated.
    """

    files: ClassVar[tuple[str, ...]] = ("cifar10-25k",)
    takes: ClassVar[str] = (
        "a folder with a folder for each class, CLASS/NAME.png or another kind of picture; three pictures or more each"
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "pictures labelled rightly", kind="share", higher=True),
        Metric("nll", "held-out cross-entropy, nats/picture", "nats/picture"),
    )  # fmt: skip
    references: ClassVar[tuple[str, ...]] = ("residual_cnn", "mobile_cnn")

    dim: int = 32
    layers: int = 1
    batch: int = 64
    weight_decay: float = 0.05
    samples_judged: int = 5000
    pixels: int = 32
    patch: int = 2
    augment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 1 or (self.pixels and self.pixels < self.patch):
            raise UserError("patch counts pixels, 1 or more, and pixels is no less, or 0")
        if self.batch < 2:
            raise UserError("batch is 2 pictures or more: models are normalised over a batch")

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.floored(accuracy=1 / len(self.classes)), *MODEL_METRICS)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of a model's logits."""
        return _classes(self.folder) if self.folder else photograph_classes.CLASSES

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        found = _photographs() if folder is None else _pictures(folder, cls.takes)
        return sorted(found, key=lambda sample: by_hash(sample.name))

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", _pixels(path))

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        drawn = super().draw(rng, samples)
        return [dataclasses.replace(one, inputs=_moved(one.inputs, rng)) for one in drawn] if self.augment else drawn

    def collate(self, samples: Sequence[Sample]) -> Batch:
        images = [_sized(sample.inputs.float() / 127.5 - 1, self.pixels) for sample in samples]
        if other := [s.name for s, x in zip(samples, images, strict=True) if x.shape != images[0].shape]:
            raise UserError(f"{other[0]} has another size than {samples[0].name}: give pixels=64, say, or batch=1")
        batch: Batch = {"inputs": torch.stack(images)}
        if any(sample.target is None for sample in samples):
            return batch
        return {**batch, "targets": torch.tensor([self.classes.index(sample.target) for sample in samples])}

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return PatchModel(blocks, self.patch, self.dim, len(self.classes))

    def reference(self, width: int, kind: str = "") -> nn.Module:
        block = InvertedBlock if kind == "mobile_cnn" else ResidualBlock
        return StagedCNN(block, self.patch, self.dim, width, self.layers, self.dropout, len(self.classes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch["inputs"]).float(), batch["targets"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Label]:
        return [Label(one, self.classes) for one in model(batch["inputs"]).float().log_softmax(-1).cpu()]

    def score(self, sample: Sample, said: Label) -> Mapping[str, float]:
        right = self.classes.index(sample.target)
        return {"accuracy": float(int(said.log_probs.argmax()) == right), "nll": -float(said.log_probs[right])}

    def truth(self, sample: Sample) -> Label:
        sure = torch.full((len(self.classes),), 1e-4)
        sure[self.classes.index(sample.target)] = 1.0
        return Label(sure.log().log_softmax(-1), self.classes)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Label]) -> Sequence[Picture]:
        """Of the pictures of each class, the shares that are said to be of each."""
        counts = np.zeros((len(self.classes),) * 2)
        for sample, one in zip(samples, said, strict=True):
            counts[self.classes.index(sample.target), int(one.log_probs.argmax())] += 1
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        return (Picture("confusion of classes", self.classes, self.classes, shares.tolist(), ("true", "said")),)


def _sized(image: Tensor, side: int) -> Tensor:
    """``[3, H, W]`` with sides of ``side`` pixels; 0 leaves it."""
    if not side or image.shape[1:] == (side, side):
        return image
    return interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]


def _moved(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` mirrored or not, and moved; what comes in repeats the edge."""
    rows, columns = (
        (torch.arange(side) + int(rng.integers(-(side // 8), side // 8 + 1))).clamp(0, side - 1)
        for side in image.shape[1:]
    )
    return image[:, rows][:, :, columns.flip(0) if rng.random() < 0.5 else columns]


def _photographs() -> list[Sample]:
    found, classes = [], photograph_classes.CLASSES
    for split in ("train", "test"):
        images, labels = photograph_classes.photographs(split)
        seen = dict.fromkeys(range(len(classes)), 0)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            part: Part = "test" if split == "test" else "validation" if seen[label] < _VALIDATION else "train"
            seen[label] += 1
            found.append(Sample(f"{split} {i}", f"{split} {i}", part, image, classes[label]))
    return found


def _pictures(folder: Path, takes: str) -> list[Sample]:
    """Pictures of a folder; of each class a fifth tests and a fifth validates, in an order that says nothing."""
    found = []
    for name in _classes(str(folder)):
        paths = sorted(_files(folder / name), key=lambda path: by_hash(f"{name}/{path.name}"))
        if len(paths) < 3:
            raise UserError(f"{folder / name} has {len(paths)} pictures that can be used; it should be {takes}")
        few = max(1, len(paths) // 5)
        for i, path in enumerate(paths):
            part: Part = "test" if i < few else "validation" if i < 2 * few else "train"
            found.append(Sample(f"{name}/{path.name}", f"{name}/{path.name}", part, _pixels(path), name))
    return found


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in _KINDS]


@cache
def _classes(folder: str) -> tuple[str, ...]:
    """Names of the user's classes, sorted; UserError where there are fewer than two."""
    place = Path(folder)
    found = sorted(path.name for path in place.iterdir() if path.is_dir() and _files(path)) if place.is_dir() else []
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} folders of pictures; it should be {PictureLabels.takes}")
    return tuple(found)


def _pixels(path: Path) -> Tensor:
    """uint8 ``[3, H, W]``."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0).contiguous()
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as a picture") from error
