# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that label turns of dialogues: the loss, what is said of a dialogue, and its scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from .._field import MODEL_METRICS
from .._folds import FoldedTask

__all__ = ["Labelled", "TurnTask", "turn_loss"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a model says of a dialogue.

    Attributes:
        log_probs: float32 ``[N, classes]``.
        classes: names.
        own: turns that it is asked for; of the others it says nothing.
    """

    log_probs: Tensor
    classes: Sequence[str]
    own: Sequence[bool]

    @property
    def labels(self) -> tuple[int, ...]:
        """Number of the likeliest class, turn by turn."""
        return tuple(self.log_probs.argmax(-1).tolist())

    def __str__(self) -> str:
        return "; ".join(
            f"{n + 1} {self.classes[label]}"
            for n, (label, own) in enumerate(zip(self.labels, self.own, strict=True))
            if own
        )


@dataclass(frozen=True, kw_only=True)
class TurnTask(FoldedTask):
    """A sample's ``inputs`` are the texts of a dialogue, ``target`` their labels, empty where a turn has none.

    Its ``about`` has ``own``: which turns are of somebody whose turns are labelled.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("macro_f1", "F1, mean over classes", higher=True,
               what="of the turns of a fold; a dialogue's value is the figure and what it adds to its deviation"),
        Metric("accuracy", "turns labelled rightly", higher=True,
               what="of the turns of a fold; a dialogue's value is the figure and what it adds to its deviation"),
    )  # fmt: skip

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of all labels."""

    @property
    def stated(self) -> tuple[Metric, ...]:
        """With F1 of each class, where there are dialogues that name them."""
        try:
            each = self.classes
        except UserError:
            each = ()
        return (*self.metrics, *map(_of_class, each), *MODEL_METRICS)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the turns that have a label, all of which are own."""
        return turn_loss(model(batch), batch["targets"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Labelled]:
        said = model(batch).float().log_softmax(-1).cpu()
        counts, own = batch["mask"].sum(1).tolist(), batch["own"].tolist()
        return [Labelled(said[i, :n], self.classes, own[i][:n]) for i, n in enumerate(counts)]

    def score(self, sample: Sample, said: Labelled) -> Mapping[str, float]:
        found = self.scores([sample], [said])[0]
        return {metric.name: found[metric.name] for metric in self.metrics}

    def scores(self, samples: Sequence[Sample], said: Sequence[Labelled]) -> Sequence[Mapping[str, float]]:
        """A ratio's value for a dialogue is the ratio and what the dialogue adds to its deviation, see above."""
        from sklearn.metrics import accuracy_score, f1_score

        pairs = [self._pairs(sample, one) for sample, one in zip(samples, said, strict=True)]
        true, told = np.concatenate(pairs, 1)
        there, n = np.unique(true), len(samples)
        one_true, one_told = (
            np.stack([(pair[k][:, None] == there).sum(0) for pair in pairs]) for k in (0, 1)
        )  # [dialogues, classes]
        hits = np.stack([((pair[0] == pair[1])[:, None] & (pair[0][:, None] == there)).sum(0) for pair in pairs])
        f1, both = f1_score(true, told, labels=there, average=None, zero_division=0), one_true + one_told
        values = f1 + (2 * hits - f1 * both) * n / both.sum(0)
        accuracy, turns = accuracy_score(true, told), one_true.sum(1)
        rights = accuracy + (hits.sum(1) - accuracy * turns) * n / turns.sum()
        names = [_of_class(self.classes[i]).name for i in there]
        return [
            {"macro_f1": float(row.mean()), "accuracy": float(right), **dict(zip(names, map(float, row), strict=True))}
            for row, right in zip(values, rights, strict=True)
        ]

    def _pairs(self, sample: Sample, said: Labelled) -> Any:
        """True and said number of each labelled turn, ``[2, turns]``; -1 for a turn of which nothing is said."""
        numbers, told = {name: i for i, name in enumerate(self.classes)}, said.labels
        rows = [
            (numbers[label], told[n] if n < len(told) else -1) for n, label in enumerate(sample.target) if label
        ]  # fmt: skip
        return np.array(rows, int).reshape(-1, 2).T

    def judgement(self, sample: Sample, log_probs: Tensor) -> Labelled:
        """What ``log_probs [own turns, classes]`` of a dialogue say."""
        made = torch.zeros(len(sample.inputs), len(self.classes))
        made[torch.tensor(sample.about["own"])] = log_probs
        return Labelled(made, self.classes, sample.about["own"])

    def truth(self, sample: Sample) -> Labelled:
        sure = torch.full((len(sample.target), len(self.classes)), 1e-4)
        for row, label in zip(sure, sample.target, strict=True):
            row[self.classes.index(label) if label else 0] = 1.0
        return Labelled(sure.log().log_softmax(-1), self.classes, [bool(label) for label in sample.target])

    def pictures(self, samples: Sequence[Sample], said: Sequence[Labelled]) -> Sequence[Picture]:
        """Confusion, and precision, recall and F1 of each class."""
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        pairs = np.concatenate([self._pairs(sample, one) for sample, one in zip(samples, said, strict=True)], 1)
        every = list(range(len(self.classes)))
        counts = confusion_matrix(*pairs, labels=every)
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        scores = np.stack(precision_recall_fscore_support(*pairs, labels=every, zero_division=0)[:3], 1)
        names = self.classes
        return (
            Picture("confusion of strategies", names, names, shares.tolist(), ("true", "said")),
            Picture(
                "scores of strategies", names, ("precision", "recall", "F1"), scores.tolist(), ("classes", "scores")
            ),
        )


def turn_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the turns ``[B, N]`` whose target is not -1; 0 where there is none."""
    kept = targets >= 0
    return cross_entropy(logits.float()[kept], targets[kept], reduction="sum") / kept.sum().clamp(min=1)


def _of_class(name: str) -> Metric:
    return Metric(f"f1_{name.replace('-', '_')}", f"F1 of {name}", higher=True)
