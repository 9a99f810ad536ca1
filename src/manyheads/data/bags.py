# SPDX-License-Identifier: Apache-2.0
"""Bags of instances of which the bag alone is labelled: public sets, bags that are made of digits, files of one's own.

``ucsb``      58 images of breast tissue, one a patient, 26 malignant; 21 to 40 patches of each, 708 features
``musk1``     92 molecules, 47 of which smell of musk; 2 to 40 shapes of each, 166 features
``musk2``     102 molecules, 39 of which do; 1 to 1,044 shapes, 166 features
``elephant``  200 photographs, 100 with an elephant; 2 to 13 segments, 230 features
``digits``    made here of scikit-learn's handwritten digits, with instances that are easy and hard to tell

A patient stands for whatever its bags have in common; in the public sets every bag has one of its own.
"""

import csv
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..errors import UserError

__all__ = ["CLASSES", "FOLDS", "Bag", "bags", "digit_bags", "read_bag", "read_folder"]

FOLDS = 10  # of images that bags of digits are made of
CLASSES: Mapping[str, tuple[str, str]] = {  # the second one is the positive
    "ucsb": ("benign", "malignant"), "musk1": ("no musk", "musk"), "musk2": ("no musk", "musk"),
    "elephant": ("no elephant", "elephant"), "digits": ("without", "with"),
}  # fmt: skip
_MEMBERS = {"ucsb": "ucsb_breast_cancer", "musk1": "musk1", "musk2": "musk2", "elephant": "elephant"}
_SIZE, _NOISE = 60, 0.1  # instances of a bag of digits, deviation of what is added to pixels from 0 to 1
_HARD, _EASY = 5, 0  # digits that only positive bags hold
_HARD_ONES, _EASY_ONES, _WITH_EASY = 2, 3, 0.9  # of them in a positive bag, and share of those that hold easy ones
_MADE, _EXTRA = 20, 16  # bags of a fold, and positive ones more that are judged alone, without easy instances


@dataclass(frozen=True, slots=True, eq=False)
class Bag:
    """Instances with one label.

    Attributes:
        name: of it alone.
        patient: what it shares with other bags.
        values: float32 ``[N, F]``, N at least 1.
        label: one of two.
        kind: of bags of digits ``easy`` (easy and hard instances), ``hard`` (hard ones alone) or ``none``.
        fold: of the images that a bag of digits is made of; None elsewhere.
        extra: it is judged, and not trained on.
    """

    name: str
    patient: str
    values: np.ndarray
    label: str
    kind: str = ""
    fold: int | None = None
    extra: bool = False


@cache
def bags(name: str) -> tuple[Bag, ...]:
    """The bags of a set, in its own order.

    Raises:
        UserError: there is no such set, or its file cannot be had.
    """
    from . import files

    if name == "digits":
        return digit_bags()
    if name not in _MEMBERS:
        raise UserError(f"there are no bags {name!r}; there are {', '.join(CLASSES)}")
    with zipfile.ZipFile(files.path("mil")) as archive:
        content = archive.read(f"mil/data/datasets/csv/{_MEMBERS[name]}.csv").decode()
    rows = np.loadtxt(io.StringIO(content), delimiter=",", ndmin=2)
    found = []
    for number in dict.fromkeys(rows[:, 1].tolist()):
        mine = rows[rows[:, 1] == number]
        title = f"{name} {number:g}"
        found.append(Bag(title, title, mine[:, 2:].astype(np.float32), CLASSES[name][int(mine[0, 0])]))
    return tuple(found)


@cache
def digit_bags() -> tuple[Bag, ...]:
    """Bags of 60 digits of 8 x 8 pixels from 0 to 1, in noise; no image is in bags of two folds.

    A positive bag holds two fives, its hard instances, and nine of ten hold three zeros too, its easy ones; others
    hold neither. Of each fold come 20 bags, half of them positive, and 16 positive ones more without easy instances.
    """
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rng, found = np.random.default_rng(0), []
    home = rng.permutation(len(images)) % FOLDS
    for fold in range(FOLDS):
        by_digit = {digit: images[(home == fold) & (digits == digit)] / 16 for digit in range(10)}
        rest = np.concatenate([some for digit, some in by_digit.items() if digit not in (_HARD, _EASY)])
        for i in range(_MADE + _EXTRA):
            with_it = i >= _MADE // 2
            easy = with_it and i < _MADE // 2 + round(_WITH_EASY * (_MADE // 2))
            held = [_some(rng, by_digit[_HARD], _HARD_ONES if with_it else 0)]
            held.append(_some(rng, by_digit[_EASY], _EASY_ONES if easy else 0))
            held.append(_some(rng, rest, _SIZE - sum(map(len, held))))
            values = np.concatenate(held)[rng.permutation(_SIZE)]
            values = (values + _NOISE * rng.standard_normal(values.shape)).astype(np.float32)
            kind = "easy" if easy else "hard" if with_it else "none"
            name = f"digits {fold} {i}"
            found.append(Bag(name, name, values, CLASSES["digits"][with_it], kind, fold, i >= _MADE))
    return tuple(found)


def _some(rng: np.random.Generator, images: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = images[rng.permutation(len(images))[:count]]
    return found


def read_bag(path: Path) -> np.ndarray:
    """Instances of a file of the user's, float32 ``[N, F]``: safetensors with one tensor, or CSV with a header or none.

    Raises:
        UserError: it is neither, or holds what is no finite number.
    """
    try:
        if path.suffix == ".safetensors":
            (values,) = (np.asarray(x, np.float32) for x in load_file(path).values())
        else:
            rows = [row for row in csv.reader(io.StringIO(path.read_text("utf-8"))) if row]
            if rows and not _numbers(rows[0]):
                rows = rows[1:]
            values = np.array(rows, np.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path} is no bag ({error}): give .safetensors or .csv of numbers, a row an instance"
        ) from error
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise UserError(f"{path} is no bag: it should have rows of finite numbers, one for each instance, as many each")
    return values


def _numbers(row: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in row])
    except ValueError:
        return False


def read_folder(folder: Path) -> tuple[Bag, ...]:
    """Bags of the user's own: ``bags.csv`` with bag, patient and label, and a file of instances for each bag.

    Raises:
        UserError: it is no such folder.
    """
    try:
        rows = list(csv.DictReader(io.StringIO((folder / "bags.csv").read_text("utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} has no bags.csv that can be read: it should name bag, patient and label") from error
    if not rows or not {"bag", "patient", "label"} <= set(rows[0]):
        raise UserError(f"{folder / 'bags.csv'} has no rows under a header with bag, patient and label")
    found = []
    for row in rows:
        paths = [path for end in ("safetensors", "csv") if (path := folder / f"{row['bag']}.{end}").is_file()]
        if not paths:
            raise UserError(f"{folder} has no {row['bag']}.safetensors or {row['bag']}.csv, which bags.csv names")
        found.append(Bag(row["bag"], row["patient"], read_bag(paths[0]), row["label"]))
    if len({bag.name for bag in found}) < len(found):
        raise UserError(f"{folder / 'bags.csv'} names a bag twice")
    if other := [bag.name for bag in found if bag.values.shape[1] != found[0].values.shape[1]]:
        raise UserError(f"{other[0]} has another number of features than {found[0].name}")
    return tuple(found)
