# SPDX-License-Identifier: Apache-2.0
"""Is this bag of instances positive, such as tissue seen by its patches? AUC, accuracy and F1 of unseen patients."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.masks import padded
from ...data.bags import CLASSES, FOLDS, Bag, bags, read_bag, read_folder
from ...errors import UserError
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...recipe import Batch, Part, Picture, Sample
from .._field import FieldTask
from .._statistics import auroc_values
from ._bags import AttentionPool, BagModel, BagTransformer, BlockPool, DualStream, MaxPool, MeanPool

__all__ = ["BagLabels", "Diagnosis"]

_PUBLIC = "public:"  # before the name of a set, so that it is no folder's
_NAMED = 3  # instances that a prediction names


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a model says of a bag.

    Attributes:
        log_probs: float32 ``[2]``.
        classes: names; the second one is the positive.
        scores: of each instance, ``[N]``: attention, or what else the model weighs them by; empty where it is not said.
    """

    log_probs: Tensor
    classes: tuple[str, str]
    scores: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def __str__(self) -> str:
        best = int(self.log_probs.argmax())
        said = f"{self.classes[best]}, probability {float(self.log_probs[best].exp()):.3f}"
        first = self.scores.argsort(descending=True)[:_NAMED].tolist()
        return f"{said}; by instances {', '.join(map(str, first))} first" if first else said


@dataclass(frozen=True, kw_only=True)
class BagLabels(FieldTask):
    """Bags are labelled, instances are not. ``dataset`` is ``ucsb``, ``musk1``, ``musk2``, ``elephant`` or ``digits``.

    Patients are dealt to ten folds, label by label (fewer, where a label has fewer patients): a seed is a fold, which
    is tested, the next one validates, the others are trained on, so that ten seeds test every bag once. Thresholds and
    areas are of a fold, and with several seeds intervals count folds. Features are brought to mean 0 and deviation 1
    of the training part. ``digits`` are made of images of which no two parts share one; of them there is a second
    area, of positive bags that hold hard instances alone.

    Attributes:
        dataset: public set, where there is no folder.
        fold: which part is tested; a seed is added to it.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("auc", "area under the ROC curve", higher=True, floor=0.5,
               what="of the bags of a fold; a bag's value is the area and what the bag adds to its deviation"),
        Metric("hard_auc", "area under the ROC curve, hard bags", higher=True, floor=0.5,
               what="positive bags of digits without an easy instance, against negative ones"),
        Metric("accuracy", "bags labelled rightly", kind="share", higher=True),
        Metric("f1", "F1 of positive bags", higher=True,
               what="of the bags of a fold together; a bag's value is its part in it, as above"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("mil",)
    takes: ClassVar[str] = (
        "a folder with bags.csv, which has the columns bag, patient and label, and for each bag a file BAG.npy or "
        "BAG.csv of numbers, a row an instance; two labels, of which the last in order is the positive one, each of "
        "three patients or more"
    )
    references: ClassVar[tuple[str, ...]] = (
        "abmil", "gated_abmil", "dsmil", "bag_transformer", "mean_of_bag", "max_of_bag",
    )  # fmt: skip

    dataset: Literal["ucsb", "musk1", "musk2", "elephant", "digits"] = field(default="ucsb")
    fold: int = 0
    dim: int = 32
    layers: int = 2
    dropout: float = 0.25
    steps: int = 400

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
        held = [sample for part in _TURNS for sample in super(BagLabels, self).samples(part)]
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
                bag.name, bag.patient, _part(home[bag.patient], 0, count), torch.from_numpy(bag.values), bag.label,
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
        found = _turned(tuple(tuple(super(BagLabels, self).samples(one)) for one in _TURNS), self.fold)[part]
        return [sample for sample in found if part != "train" or not sample.about["extra"]]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        inputs, mask = padded([sample.inputs for sample in samples])
        batch = {"inputs": inputs, "mask": mask, "names": [sample.name for sample in samples]}
        if any(sample.target is None for sample in samples):
            if wrong := [s.name for s in samples if s.inputs.shape[1] != self._scale()[0].numel()]:
                raise UserError(f"{wrong[0]} has other features than the bags that were trained on")
            return batch
        return {**batch, "targets": torch.tensor([self.classes.index(sample.target) for sample in samples])}

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of features over the instances of the training part, ``[F]`` each."""
        return _statistics(tuple(self.samples("train")))

    def _around(self, pool: nn.Module, width: int) -> BagModel:
        mean, deviation = self._scale()
        return BagModel(pool, mean.clone(), deviation.clone(), width, self.dropout)

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return self._around(BlockPool(blocks, 2 * self.dim, self.dim), 2 * self.dim)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        pools = {
            "abmil": lambda: AttentionPool(width, self.dim),
            "gated_abmil": lambda: AttentionPool(width, self.dim, gated=True),
            "dsmil": lambda: DualStream(width, self.dim),
            "bag_transformer": lambda: BagTransformer(width, self.dim, self.layers, self.heads, self.dropout),
            "mean_of_bag": lambda: MeanPool(width),
            "max_of_bag": lambda: MaxPool(width),
        }
        return self._around(pools[kind or self.references[0]](), width)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch["inputs"], batch["mask"]).float(), batch["targets"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Diagnosis]:
        read = model.read(batch["inputs"], batch["mask"])  # type: ignore[operator]
        said, scores = read.logits.float().log_softmax(-1).cpu(), read.scores.float().mean(1).cpu()
        lengths = batch["mask"].sum(1).tolist()
        return [Diagnosis(said[i], self.classes, scores[i, :n]) for i, n in enumerate(lengths)]

    def score(self, sample: Sample, said: Diagnosis) -> Mapping[str, float]:
        """Of one bag alone there is no area: the probability of what is right."""
        right = self.classes.index(sample.target)
        probability = float(said.log_probs[right].exp())
        hit = float(int(said.log_probs.argmax()) == right)
        return {"auc": probability, "hard_auc": probability, "accuracy": hit, "f1": hit}

    def scores(self, samples: Sequence[Sample], said: Sequence[Diagnosis]) -> list[Mapping[str, float]]:
        odds = np.array([float(one.log_probs[1] - one.log_probs[0]) for one in said])
        right = np.array([self.classes.index(sample.target) == 1 for sample in samples])
        kinds, extra = (np.array([sample.about[key] for sample in samples]) for key in ("kind", "extra"))
        told, n = odds > 0, (~extra).sum()
        found: list[dict[str, float]] = [{} for _ in samples]

        def put(name: str, which: np.ndarray, values: np.ndarray) -> None:
            for i, value in zip(np.flatnonzero(which), values, strict=True):
                found[i][name] = float(value)

        for name, which in (("auc", ~extra), ("hard_auc", (kinds == "hard") | (kinds == "none"))):
            if 0 < right[which].sum() < which.sum():
                put(name, which, auroc_values(odds[which], right[which], np.zeros(which.sum())))
        put("accuracy", ~extra, (told == right)[~extra])
        hits, both = (right & told)[~extra], (right[~extra].astype(int) + told[~extra])
        if both.any():
            f1 = 2 * hits.sum() / both.sum()
            put("f1", ~extra, f1 + (2 * hits - f1 * both) * n / both.sum())
        return list(found)

    def truth(self, sample: Sample) -> Diagnosis:
        sure = torch.full((2,), 1e-4)
        sure[self.classes.index(sample.target)] = 1.0
        return Diagnosis(sure.log().log_softmax(-1), self.classes)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Diagnosis]) -> Sequence[Picture]:
        """Shares of the probability of being positive, by label."""
        chance = np.array([float(one.log_probs[1].exp()) for one in said])
        edges, labels = np.linspace(0, 1, 11), np.array([sample.target for sample in samples])
        rows = [name for name in self.classes if (labels == name).any()]
        shares = [(np.histogram(chance[labels == name], edges)[0] / (labels == name).sum()).tolist() for name in rows]
        columns = [f"{low:.1f}" for low in edges[:-1]]
        return (Picture(f"probability of {self.classes[1]}", rows, columns, shares, ("label", "probability, from")),)

    def units(self, run: RunContext) -> list[WorkUnit]:
        tried = float(len(self.rates) * self.steps)
        return [dataclasses.replace(unit, cost=tried) for unit in super().units(run)]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        """As one run of its own fold, in which the rate is chosen too."""
        alone = run.among(run.arms, run.advance)
        alone.seeds = (unit.params["seed"],)
        for row in FieldTask.measure(dataclasses.replace(self, fold=self.fold + unit.params["seed"]), alone, unit):
            first = unit.params["seed"] == run.seeds[0]  # of whose fold pictures are kept
            about = {name: x for name, x in row.about.items() if first or name != "pictures"}
            yield dataclasses.replace(row, about=about)


_TURNS: tuple[Part, ...] = ("test", "validation", "train")


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
    order = sorted(of_patient, key=lambda patient: (of_patient[patient], _hash(patient)))
    return {patient: i % count for i, patient in enumerate(order)}, count


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _part(home: int, fold: int, count: int) -> Part:
    return {0: "test", 1: "validation"}.get((home - fold) % count, "train")  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _turned(parts: tuple[tuple[Sample, ...], ...], fold: int) -> dict[Part, tuple[Sample, ...]]:
    """Samples by part where folds have moved on; ``parts`` are those of the first fold."""
    moved = [
        dataclasses.replace(s, part=_part(s.about["fold"], fold, s.about["folds"])) if fold else s
        for some in parts for s in some
    ]  # fmt: skip
    moved.sort(key=lambda sample: _hash(sample.name))
    return {part: tuple(s for s in moved if s.part == part) for part in _TURNS}


@lru_cache(maxsize=32)
def _statistics(samples: tuple[Sample, ...]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; a feature that does not vary has deviation 1."""
    values = torch.cat([sample.inputs for sample in samples]).double()
    deviation = values.std(0, correction=0)
    return values.mean(0).float(), torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)).float()
