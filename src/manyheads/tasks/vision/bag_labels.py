# SPDX-License-Identifier: Apache-2.0
"""Is this bag of instances positive, such as tissue seen by its patches? AUC, accuracy and F1 of unseen patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ...data.bags import CLASSES, FOLDS, Bag, bags, read_bag, read_folder
from ...errors import UserError
from ...recipe import Part, Sample
from .._folds import PARTS, by_hash, part_of, turned
from ._bag_task import BagTask

__all__ = ["BagLabels"]

_PUBLIC = "public:"  # before the name of a set, so that it is no folder's


@dataclass(frozen=True, kw_only=True)
class BagLabels(BagTask):
    """Bags are labelled, instances are not. ``dataset`` is ``ucsb``, ``musk1``, ``musk2``, ``elephant`` or ``digits``.

    Patients are dealt to ten folds, label by label (fewer, where a label has fewer patients): a seed is a fold, which
    is tested, the next one validates, the others are trained on, so that ten seeds test every bag once. Thresholds and
    areas are of a fold, and with several seeds intervals count folds. ``digits`` are made of images of which no two
    parts share one; of them there is a second area, of positive bags that hold hard instances alone.

    Attributes:
        dataset: public set, where there is no folder.
    """

    files: ClassVar[tuple[str, ...]] = ("mil",)
    takes: ClassVar[str] = (
        "a folder with bags.csv, which has the columns bag, patient and label, and for each bag a file "
        "BAG.safetensors (one tensor) or BAG.csv of numbers, a row an instance; two labels, of which the last in order "
        "is the positive one, each of three patients or more"
    )
    dataset: Literal["ucsb", "musk1", "musk2", "elephant", "digits"] = field(default="ucsb")

    @property
    def source(self) -> str:
        return self.folder or _PUBLIC + self.dataset

    @property
    def label(self) -> str:
        return "" if self.folder else self.dataset

    @property
    def classes(self) -> tuple[str, str]:
        """Names; the second one is the positive."""
        if not self.folder:
            return CLASSES[self.dataset]
        held = [sample for part in PARTS for sample in super(BagLabels, self).samples(part)]
        first, last = sorted({sample.about["label"] for sample in held})
        return first, last

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        """Bags of a folder, or of the public set of that name."""
        name = str(folder or _PUBLIC + "ucsb")
        found = bags(name.removeprefix(_PUBLIC)) if name.startswith(_PUBLIC) else read_folder(Path(name))
        home, count = _folds(found)
        return [
            Sample(
                bag.name, bag.patient, part_of(home[bag.patient], 0, count), torch.from_numpy(bag.values), bag.label,
                {
                    "fold": home[bag.patient], "folds": count, "kind": bag.kind, "extra": bag.extra,
                    "label": bag.label,
                },
            )
            for bag in found
        ]  # fmt: skip

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", torch.from_numpy(read_bag(path)))

    def samples(self, part: Part) -> Sequence[Sample]:
        """Bags of a part of the fold, in an order that says nothing."""
        found = turned(tuple(tuple(super(BagLabels, self).samples(one)) for one in PARTS), self.fold)[part]
        return [sample for sample in found if part != "train" or not sample.about["extra"]]


def _folds(found: Sequence[Bag]) -> tuple[dict[str, int], int]:
    """Fold of each patient, and how many there are; patients of a label are dealt in turn, in an order by hash.

    Raises:
        UserError: there are not two labels, or a label has fewer than three patients.
    """
    if found[0].fold is not None:
        return {bag.patient: bag.fold or 0 for bag in found}, FOLDS
    labels = sorted({bag.label for bag in found})
    if len(labels) != 2:
        raise UserError(f"there are the labels {', '.join(labels)}; there should be two, the positive one the last")
    of_patient: dict[str, str] = {}
    for bag in found:
        of_patient[bag.patient] = max(bag.label, of_patient.get(bag.patient, ""))
    held = Counter(of_patient.values())
    if min(held[label] for label in labels) < 3:
        raise UserError(
            f"of {' and '.join(labels)} there are {' and '.join(str(held[label]) for label in labels)} patients, and "
            "three of each are needed: to train on, to choose the learning rate by, and to test"
        )
    count = min(FOLDS, *held.values())
    order = sorted(of_patient, key=lambda patient: (of_patient[patient], by_hash(patient)))
    return {patient: i % count for i, patient in enumerate(order)}, count
