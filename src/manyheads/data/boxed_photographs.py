# SPDX-License-Identifier: Apache-2.0
"""Photographs with boxes around the objects in them: blood cells, shapes that are planted here, folders of one's own.

``bccd``     364 photographs of blood, 640 x 480 pixels, by microscope: 4,153 red cells, 372 white ones, 361 platelets,
             in the parts that were published with them (205, 87 and 72)
``planted``  200 pictures of 160 x 120 pixels, made here: discs, squares and triangles, one to five, on noise
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import UserError

__all__ = ["CLASSES", "Boxed", "blood_cells", "planted", "read_folder", "read_image"]

CLASSES: Mapping[str, tuple[str, ...]] = {
    "bccd": ("RBC", "WBC", "Platelets"), "planted": ("disc", "square", "triangle")
}  # fmt: skip
_PARTS = {"train": "train", "val": "validation", "test": "test"}
_PLANTED, _HEIGHT, _WIDTH = 200, 120, 160
_CHANCES = (0.7, 0.15, 0.15)  # of the shapes that are planted


@dataclass(frozen=True, slots=True, eq=False)
class Boxed:
    """A photograph.

    Attributes:
        name: of it alone.
        part: ``train``, ``validation`` or ``test``, empty where its set has no parts.
        image: uint8 ``[height, width, 3]``.
        boxes: left, upper, right and lower edges in pixels, float32 ``[n, 4]``.
        labels: of the boxes.
    """

    name: str
    part: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: tuple[str, ...]


def blood_cells() -> Iterator[Boxed]:
    """BCCD in the parts that were published with it; two boxes without an extent are left out.

    Raises:
        UserError: the file cannot be had.
    """
    from . import files

    with zipfile.ZipFile(files.path("bccd")) as archive:
        root = archive.namelist()[0].partition("/")[0] + "/BCCD"
        yield from _voc(lambda name: archive.read(f"{root}/{name}"), "JPEGImages/{}.jpg")


def read_folder(folder: Path) -> Iterator[Boxed]:
    """Photographs of the user's own, as PASCAL VOC lays them out.

    ``Annotations/NAME.xml``, ``JPEGImages/NAME.jpg`` or ``.png``, and if there is one, a split by names,
    ``ImageSets/Main/train.txt``, ``val.txt`` and ``test.txt``.

    Raises:
        UserError: it is no such folder, or an image or its boxes cannot be read.
    """
    if not (names := sorted(path.stem for path in folder.glob("Annotations/*.xml"))):
        raise UserError(f"{folder} has no Annotations/*.xml that say where objects are, as PASCAL VOC has them")
    if all((folder / f"ImageSets/Main/{part}.txt").is_file() for part in _PARTS):
        yield from _voc(lambda name: (folder / name).read_bytes(), "", folder)
        return
    for name in names:
        yield _one(name, "", (folder / f"Annotations/{name}.xml").read_bytes(), _image_beside(folder, name))


def _voc(read: Callable[[str], bytes], image: str, folder: Path | None = None) -> Iterator[Boxed]:
    """Photographs in the parts that text files name."""
    for file, part in _PARTS.items():
        for name in read(f"ImageSets/Main/{file}.txt").decode().split():
            try:
                pixels = _decoded(read(image.format(name)), name) if folder is None else _image_beside(folder, name)
                yield _one(name, part, read(f"Annotations/{name}.xml"), pixels)
            except (KeyError, FileNotFoundError) as error:
                raise UserError(f"{name} is named by {file}.txt and is not there ({error})") from error


def _image_beside(folder: Path, name: str) -> NDArray[np.uint8]:
    for end in ("jpg", "png", "jpeg"):
        if (path := folder / f"JPEGImages/{name}.{end}").is_file():
            return read_image(path)
    raise UserError(f"{folder} has no JPEGImages/{name}.jpg or .png, which Annotations/{name}.xml is of")


def _one(name: str, part: str, xml: bytes, image: NDArray[np.uint8]) -> Boxed:
    """A photograph with the boxes of its annotation, cut off at its edges; what has no extent is left out."""
    boxes, labels = [], []
    height, width = image.shape[:2]
    try:
        for thing in ElementTree.fromstring(xml).iter("object"):
            edges = [float(thing.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
            box = np.clip(edges, 0, [width, height, width, height])
            if box[2] > box[0] and box[3] > box[1]:
                boxes.append(box)
                labels.append(thing.findtext("name", ""))
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"the annotation of {name} cannot be read ({error})") from error
    return Boxed(name, part, image, np.array(boxes, np.float32).reshape(-1, 4), tuple(labels))


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image of the user's, uint8 ``[height, width, 3]``; UserError where it is none."""
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _decoded(content: bytes, name: str) -> NDArray[np.uint8]:
    try:
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{name} is no image that can be read ({error})") from error


def planted() -> Iterator[Boxed]:
    """Pictures that are made here; shapes lie apart, seven of ten are discs, and what is drawn fills its box."""
    rng = np.random.default_rng(0)
    ends = (0.6 * _PLANTED, 0.8 * _PLANTED)
    for i in range(_PLANTED):
        part = "train" if i < ends[0] else "validation" if i < ends[1] else "test"
        image = rng.uniform(70, 130, 3) + 20 * rng.standard_normal((_HEIGHT, _WIDTH, 3))
        boxes: list[list[int]] = []
        labels = []
        for _ in range(rng.integers(1, 6)):
            side = int(rng.integers(14, 40))
            x, y = int(rng.integers(0, _WIDTH - side)), int(rng.integers(0, _HEIGHT - side))
            box = [x, y, x + side, y + side]
            if any(_touch(box, other) for other in boxes):
                continue
            kind = int(rng.choice(3, p=_CHANCES))
            inside = _shape(kind, side)
            bright = rng.uniform(150, 250, 3) if rng.random() < 0.5 else rng.uniform(0, 40, 3)
            image[y : y + side, x : x + side][inside] = bright + 10 * rng.standard_normal((int(inside.sum()), 3))
            boxes.append(box)
            labels.append(CLASSES["planted"][kind])
        pixels = image.clip(0, 255).astype(np.uint8)
        yield Boxed(f"planted {i}", part, pixels, np.array(boxes, np.float32), tuple(labels))


def _touch(one: list[int], other: list[int]) -> bool:
    return max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(one[3], other[3])


def _shape(kind: int, side: int) -> NDArray[np.bool_]:
    """Cells of a square of so many pixels that a disc, a square or a triangle with its tip above covers."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    made: NDArray[np.bool_] = (
        (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25 if kind == 0
        else np.ones((side, side), bool) if kind == 1 else 2 * np.abs(x - 0.5) <= y
    )  # fmt: skip
    return made
