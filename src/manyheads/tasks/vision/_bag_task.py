# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that label bags of instances: batches, models, the loss, what is said of a bag, and its scores."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.masks import padded
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from .._folds import FoldedTask
from .._statistics import auroc_values
from ._bags import AttentionPool, BagModel, BagTransformer, BlockPool, DualStream, MaxPool, MeanPool

__all__ = ["BagTask", "Diagnosis"]

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
class BagTask(FoldedTask):
    """Bags are ``inputs [N, F]`` float32, their ``target`` is one of two classes. Features are brought to mean 0 and
    deviation 1 of the training part.
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
    references: ClassVar[tuple[str, ...]] = (
        "abmil", "gated_abmil", "dsmil", "bag_transformer", "mean_of_bag", "max_of_bag",
    )  # fmt: skip

    dim: int = 32
    layers: int = 2
    dropout: float = 0.25
    steps: int = 400

    @property
    @abstractmethod
    def classes(self) -> tuple[str, str]:
        """Names; the second one is the positive."""

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
        pools: dict[str, Callable[[], nn.Module]] = {
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


@lru_cache(maxsize=32)
def _statistics(samples: tuple[Sample, ...]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; a feature that does not vary has deviation 1."""
    values = torch.cat([sample.inputs for sample in samples]).double()
    deviation = values.std(0, correction=0)
    return values.mean(0).float(), torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)).float()
