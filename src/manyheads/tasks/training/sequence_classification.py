# SPDX-License-Identifier: Apache-2.0
"""Classes of whole sequences, of bytes, speech or a series, by classifiers of each arm trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.labelled import DATASETS, Item, Labelled, labelled
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...models.classifier import Classifier, ClassifierConfig, StemKind
from ...models.decoder import TokenModel
from ...training import BatchFn
from ...training.fit import autocast
from ...training.language import with_auxiliary
from ._bytes import VOCAB
from ._decoders import check_rows
from ._training_task import TrainingTask, at_once

__all__ = ["SequenceClassification"]

_STEMS: dict[str, StemKind] = {"bytes": "embedding", "waveform": "conv", "series": "patches"}


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(TrainingTask):
    """Train a classifier of every arm on one data set, and judge it on groups that none has seen.

    Training reads stretches of ``length`` bytes or values from a random place of a random sequence; what is judged are
    the stretches of the test part that follow each other, up to ``samples`` of them, one of every sequence before a
    second of any. Shorter sequences are filled up with zeros, silence. Speakers, documents and series of the test part
    are in no other. Two stretches of one sequence are one context for intervals.

    ``length / stride`` tokens are mixed. The floor of ``accuracy`` is the share of the class most frequent in the test
    part, which says what a guess reaches.

    Attributes:
        data: a data set of :mod:`manyheads.data.labelled`.
        stride: values of a token, for waveforms and series.
        stretch: how much slower or faster a waveform may be read in training, as a share; a shorter one then begins
            anywhere. Speakers differ by more than that: with few of them it is what tells words from voices.
        label: name of this task in an experiment that has it several times.
    """

    stored: ClassVar[str] = "classes-"
    kind: ClassVar[type[TokenModel]] = Classifier
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "held-out accuracy", higher=True, kind="share"),
        Metric("label_nll", "held-out loss, nats/sequence", "nats/sequence"),
        Metric("tuning_nll", "loss on what is set aside for tuning, nats/sequence", "nats/sequence"),
        Metric("training_nll", "loss in the last tenth of training, nats/sequence", "nats/sequence"),
    )

    data: str = "fsdd"
    stride: int = 1
    stretch: float = 0.0
    label: str = ""
    samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in DATASETS:
            raise UserError(f"there are no labelled sequences {self.data!r}; there are {', '.join(DATASETS)}")
        if self.stride < 1 or self.length % self.stride:
            raise UserError(f"{self.length} values do not part into tokens of {self.stride}")
        if not 0 <= self.stretch < 1 or (self.stretch and DATASETS[self.data].kind != "waveform"):
            raise UserError("stretch is a share below 1, of waveforms")
        if self.batch < 2:
            raise UserError("whether sequences see each other is tried on two of a batch: give a batch of 2 or more")

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.floored(accuracy=DATASETS[self.data].floor)

    @property
    def vocab(self) -> int:
        """Classes: what a model says is one of them."""
        return DATASETS[self.data].classes

    @property
    def config(self) -> ClassifierConfig:
        stem = _STEMS[DATASETS[self.data].kind]
        return ClassifierConfig(
            VOCAB, self.dim, self.layers, self.heads, length=self.length // self.stride, classes=self.vocab, stem=stem,
            stride=self.stride,
        )  # fmt: skip

    def training_fields(self) -> Sequence[str]:
        return ("data", "stride", "stretch")

    def units(self, run: RunContext) -> list[WorkUnit]:
        self._part(run, "train")  # what cannot be had is found now
        return super().units(run)

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        items = self._part(run, "train")

        def get_batch(step: int) -> tuple[Tensor, Tensor]:
            rng = run.rng(training=seed, step=step)
            drawn = [items[i] for i in rng.integers(0, len(items), self.batch)]
            labels = torch.tensor([item.label for item in drawn])
            if self.stretch:
                rates = rng.uniform(1 - self.stretch, 1 + self.stretch, len(drawn))
                return _replayed(drawn, rates, rng.uniform(size=len(drawn)), self.length), labels
            first = [int(rng.integers(0, max(0, len(item.values) - self.length) + 1)) for item in drawn]
            return self._stretches(drawn, first), labels

        return get_batch

    def check(self, model: TokenModel, ids: Tensor, name: str) -> None:
        check_rows(model, ids, name)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        values, labels = batch
        return with_auxiliary(cross_entropy(model(values)[0].float(), labels), model)

    def validation(self, run: RunContext, model: TokenModel) -> float:
        items = self._part(run, "validation")[: self.samples]
        logits = self._logits(run, model, items, [0] * len(items))
        return float(cross_entropy(logits, torch.tensor([item.label for item in items])))

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        items, first = self._judged(run)
        logits = self._logits(run, model, items, first)
        labels = torch.tensor([item.label for item in items])
        losses = cross_entropy(logits, labels, reduction="none").tolist()
        said = logits.argmax(1).tolist()
        for item, at, loss, answer in zip(items, first, losses, said, strict=True):
            more = {"context": item.name, "seed": seed, "about": {"group": item.group, "said": answer}}
            sample = f"{item.name} from {at}"
            yield self.row("accuracy", arm, answer == item.label, sample, **more)
            yield self.row("label_nll", arm, loss, sample, **more)

    def _judged(self, run: RunContext) -> tuple[list[Item], list[int]]:
        """Stretches of the test part: sequences, and where each begins."""
        items = self._part(run, "test")
        most = max(len(item.values) for item in items)
        places = [
            (item, first) for first in range(0, most, self.length) for item in items
            if first == 0 or first + self.length <= len(item.values)
        ]  # fmt: skip
        judged, first = zip(*places[: self.samples], strict=True)
        return list(judged), list(first)

    def _logits(self, run: RunContext, model: nn.Module, items: Sequence[Item], first: Sequence[int]) -> Tensor:
        """``[N, classes]`` in float32 on the CPU."""
        found = []
        for rows in self._stretches(items, first).split(at_once(self.length // self.stride)):
            with torch.no_grad(), autocast(run.device):
                found.append(model(rows.to(run.device))[0].float().cpu())
        return torch.cat(found)

    def _stretches(self, items: Sequence[Item], first: Sequence[int]) -> Tensor:
        """Ids ``[N, length]`` or values ``[N, length, channels]``."""
        found = items[0].values.new_zeros(len(items), self.length, *items[0].values.shape[1:])
        for row, item, at in zip(found, items, first, strict=True):
            values = item.values[at : at + self.length]
            row[: len(values)] = values
        return found.long() if found.dtype == torch.uint8 else found

    def _part(self, run: RunContext, part: str) -> list[Item]:
        found = cast(Labelled, run.kept(("labelled", self.data), lambda: labelled(self.data)))
        return cast(list[Item], run.kept(("labelled", self.data, part), lambda: found.part(part)))


def _replayed(items: Sequence[Item], rates: np.ndarray, places: np.ndarray, length: int) -> Tensor:
    """Waveforms ``[N, length, channels]`` read at so many times their rate, from or at ``places`` in [0, 1)."""
    found = torch.zeros(len(items), length, items[0].values.shape[1])
    for row, item, rate, place in zip(found, items, rates, places, strict=True):
        at = np.arange(0, len(item.values) - 1, rate)
        low = at.astype(np.int64)
        part = torch.from_numpy(at - low).float()[:, None]
        values = item.values[low] * (1 - part) + item.values[low + 1] * part
        free = length - len(values)
        first = int(place * (abs(free) + 1))
        if free >= 0:
            row[first : first + len(values)] = values
        else:
            row[:] = values[first : first + length]
    return found
