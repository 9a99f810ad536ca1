# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that give a window of a multivariate series its class: the model around blocks, loss, metrics."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.positions import sinusoids
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Part, Picture, Sample
from .._field import FieldTask

__all__ = ["METRICS", "Judged", "WindowModel", "WindowTask", "TemporalCNN", "TemporalLSTM"]

METRICS = (
    Metric(
        "macro_f1", "F1, mean over classes", higher=True,
        what="of all test windows together; a window's value is its part in it, so that the mean is the F1",
    ),
    Metric(
        "balanced_accuracy", "recall, mean over classes", higher=True,
        what="of all test windows together, as above; guesses have one over the number of classes",
    ),
    Metric("label_nll", "held-out cross-entropy, nats/window", "nats/window"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judged:
    """What a model says of a window, or of each window of a recording in their order.

    Attributes:
        log_probs: float32 ``[windows, classes]``.
        classes: names.
        starts: first frame of each window.
    """

    log_probs: Tensor
    classes: tuple[str, ...]
    starts: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        said = [self.classes[int(k)] for k in self.log_probs.argmax(1)]
        if len(said) == 1:
            return said[0]
        spans = [(name, [start for _, start in some]) for name, some in groupby(
            zip(said, self.starts, strict=True), key=lambda pair: pair[0]
        )]  # fmt: skip
        return ", ".join(f"{name} from {at[0]}" for name, at in spans)


class WindowModel(nn.Module):
    """Frames ``[B, T, channels]`` -> logits ``[B, classes]``: normalised, blocks over frames, their mean, a layer.

    Args:
        blocks: each ``block(x [B, T, dim], mask [B, T]) -> [B, T, dim]``.
        channels, dim, classes: sizes.
        dropout: before the blocks.
        positions: add sinusoidal ones, for blocks that have none of their own.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], channels: int, dim: int, classes: int, dropout: float, positions: bool
    ) -> None:
        super().__init__()
        self.scale, self.project = nn.BatchNorm1d(channels, affine=False), nn.Linear(channels, dim)
        self.blocks, self.positions, self.dropout = nn.ModuleList(blocks), positions, nn.Dropout(dropout)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits."""
        x = self.project(self.scale(frames.mT).mT)
        if self.positions:
            x = x + sinusoids(torch.arange(x.shape[1], device=x.device), x.shape[2]).to(x)
        x, mask = self.dropout(x), torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class TemporalLSTM(nn.Module):
    """A bidirectional LSTM of ``dim / 2`` cells each way and an MLP of hidden size ``width``, each with a residual."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.norm, self.mlp = nn.LayerNorm(dim), _mlp(dim, width, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, dim]``; there is no padding."""
        x = x + self.lstm(self.norm(x))[0]
        out: Tensor = x + self.mlp(x)
        return out


class TemporalCNN(nn.Module):
    """A convolution of each feature over seven frames, then an MLP of hidden size ``width``, as in ConvNeXt."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.mlp = nn.Conv1d(dim, dim, 7, padding=3, groups=dim), _mlp(dim, width, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, dim]``; there is no padding."""
        out: Tensor = x + self.mlp(self.conv(x.mT).mT)
        return out


def _mlp(dim: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim), nn.Dropout(dropout)
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Windows(FieldTask):
    """Recordings are cut into windows: ``inputs [frames, channels]`` float32, ``target`` the name of a class.

    Intervals are over groups of recordings, where several are tested.

    Attributes:
        frames: of a window.
        every: frames between two windows of a recording.
    """

    frames: int = 30
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.frames, self.every) < 1:
            raise UserError("frames and every count frames, 1 or more")

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of a model's logits."""

    @property
    @abstractmethod
    def channels(self) -> tuple[str, ...]:
        """Names of the columns of a window."""

    @abstractmethod
    def cut(self, recording: Sample) -> Sequence[Sample]:
        """The windows of a recording, each with its class."""

    def recordings(self, part: Part) -> tuple[Sample, ...]:
        """What windows of a part are cut from."""
        return tuple(super().samples(part))

    def samples(self, part: Part) -> Sequence[Sample]:
        """Windows of the recordings of a part, in an order that says nothing."""
        if found := _windows(self, self.recordings(part)):
            return found
        raise UserError(
            f"no recording of the {part} part has {self.frames} frames and a class; give longer ones, or fewer frames"
        )

    def context(self, sample: Sample) -> str:
        return sample.group if len({one.group for one in self.recordings("test")}) > 1 else ""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        if short := [sample.name for sample in samples if len(sample.inputs) < self.frames]:
            raise UserError(f"{short[0]} has fewer than the {self.frames} frames of a window")
        if wrong := [sample.name for sample in samples if sample.inputs.shape[1] != len(self.channels)]:
            raise UserError(f"{wrong[0]} has other columns than {', '.join(self.channels[:6])}, ...")
        if any(sample.target is None for sample in samples):  # recordings of the user's
            starts = [self.starts(sample) for sample in samples]
            inputs = [self.window(sample, start) for sample, at in zip(samples, starts, strict=True) for start in at]
            return {"inputs": torch.stack(inputs), "starts": starts}
        targets = torch.tensor([self.classes.index(sample.target) for sample in samples])
        return {
            "inputs": torch.stack([sample.inputs for sample in samples]), "starts": [(0,)] * len(samples),
            "targets": targets,
        }  # fmt: skip

    def starts(self, sample: Sample) -> tuple[int, ...]:
        """First frames of the windows of a recording."""
        return tuple(range(0, len(sample.inputs) - self.frames + 1, self.every))

    def window(self, sample: Sample, start: int) -> Tensor:
        """``[frames, channels]`` of a recording as models read them."""
        inputs: Tensor = sample.inputs[start : start + self.frames]
        return inputs


@dataclass(frozen=True, kw_only=True)
class WindowTask(Windows):
    """Base of tasks that give windows their classes: the model around blocks, loss and scores."""

    metrics: ClassVar[tuple[Metric, ...]] = METRICS

    def around(self, blocks: Sequence[nn.Module], positions: bool = False) -> nn.Module:
        return WindowModel(blocks, len(self.channels), self.dim, len(self.classes), self.dropout, positions)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch["inputs"]).float(), batch["targets"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Judged]:
        said, starts = model(batch["inputs"]).float().log_softmax(-1).cpu(), batch["starts"]
        parts = said.split([len(at) for at in starts])
        return [Judged(part, self.classes, at) for part, at in zip(parts, starts, strict=True)]

    def judgement(self, log_probs: Tensor) -> Judged:
        """What ``log_probs [1, classes]`` say."""
        return Judged(log_probs, self.classes)

    def score(self, sample: Sample, said: Judged) -> Mapping[str, float]:
        return self.scores([sample], [said])[0]

    def scores(self, samples: Sequence[Sample], said: Sequence[Judged]) -> Sequence[Mapping[str, float]]:
        """Recall, TP / true, and F1, 2 TP / (true + said), are ratios, which a window's value has as its mean.

        The value is the ratio and what the window adds to its deviation, so that the spread of values is the ratio's.
        """
        log_probs = torch.stack([one.log_probs[0] for one in said]).double().numpy()
        eye, n = np.eye(len(self.classes)), len(samples)
        true, told = eye[[self.classes.index(s.target) for s in samples]], eye[log_probs.argmax(1)]
        there = true.any(0)
        true, told = true[:, there], told[:, there]
        hits, both, counts = true * told, true + told, true.sum(0)
        f1 = 2 * hits.sum(0) / both.sum(0)
        values = (f1 + (2 * hits - f1 * both) * n / both.sum(0)).mean(1)
        recall = hits.sum(0) / counts
        recalls = (recall + (hits - recall * true) * n / counts).mean(1)
        losses = -(log_probs[:, there] * true).sum(1)
        names = [metric.name for metric in METRICS]
        return [dict(zip(names, map(float, row), strict=True)) for row in zip(values, recalls, losses, strict=True)]

    def truth(self, sample: Sample) -> Judged:
        sure = torch.full((1, len(self.classes)), 1e-4)
        sure[0, self.classes.index(sample.target)] = 1.0
        return Judged(sure.log().log_softmax(-1), self.classes)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Judged]) -> Sequence[Picture]:
        counts = np.zeros((len(self.classes),) * 2)
        for sample, one in zip(samples, said, strict=True):
            counts[self.classes.index(sample.target), int(one.log_probs[0].argmax())] += 1
        hits, true, told = counts.diagonal(), counts.sum(1), counts.sum(0)
        shares = counts / true[:, None].clip(min=1)
        scores = np.stack((hits / told.clip(min=1), hits / true.clip(min=1), 2 * hits / (true + told).clip(min=1)), 1)
        return (
            Picture("confusion of classes", self.classes, self.classes, shares.tolist(), ("true", "said")),
            Picture(
                "scores of classes", self.classes, ("precision", "recall", "F1"), scores.tolist(), ("classes", "scores")
            ),
        )


@lru_cache(maxsize=6)
def _windows(task: Windows, recordings: tuple[Sample, ...]) -> Sequence[Sample]:
    """Windows of recordings; one that has a class as a whole is a window already."""
    found = [window for one in recordings for window in ([one] if isinstance(one.target, str) else task.cut(one))]
    return sorted(found, key=lambda window: hashlib.sha256(window.name.encode()).digest())
