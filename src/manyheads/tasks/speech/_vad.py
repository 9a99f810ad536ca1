# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that find speech in frames: the model around a fusion of two streams, its loss, and frame metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from .._field import FieldTask
from ._cepstra import COEFFICIENTS
from ._mixtures import FRAME
from ._whisper import width_of

__all__ = ["Activity", "FrameTask", "VadModel"]

_SECONDS = FRAME / 8000  # of a frame


@dataclass(frozen=True, eq=False)
class Activity:
    """What is said of a recording.

    Attributes:
        speech: probability of speech by frame of 20 ms, ``[T]``.
    """

    speech: Tensor

    def __str__(self) -> str:
        said = [0, *(self.speech >= 0.5).int().tolist(), 0]
        at = [i for i, (one, other) in enumerate(pairwise(said)) if one != other]
        return ", ".join(f"{a * _SECONDS:.2f}-{b * _SECONDS:.2f}" for a, b in zip(at[::2], at[1::2], strict=True))


class VadModel(nn.Module):
    """Two streams of frames, MFCC and Whisper's, each brought to ``dim``, fused, and read by a bidirectional LSTM.

    Args:
        fusion: ``fusion(mfcc [B, T, dim], whisper [B, T, dim], mask [B, T]) -> [B, T, size]``.
        size: of what it gives.
        dim: of layers.
        states: of Whisper.
        hidden: of each direction of the LSTM.
        layers: of it.
        dropout: between layers.
    """

    def __init__(
        self, fusion: nn.Module, size: int, dim: int, states: int, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.mfcc, self.whisper = nn.Linear(COEFFICIENTS, dim), nn.Linear(states, dim)
        self.fusion, drop = fusion, nn.Dropout(dropout)
        self.before = nn.Sequential(nn.Linear(size, dim), nn.GELU(), drop, nn.Linear(dim, dim), nn.GELU())
        self.recurrent = nn.LSTM(
            dim, hidden, layers, batch_first=True, bidirectional=True, dropout=dropout * (layers > 1)
        )
        self.after = nn.Sequential(nn.Linear(2 * hidden, dim), nn.GELU(), drop, nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Linear(dim, 1)

    def forward(self, cepstra: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Logits of speech ``[B, T]``."""
        x = self.before(self.fusion(self.mfcc(cepstra), self.whisper(states), mask))
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=x.shape[1])
        logits: Tensor = self.head(self.after(x))[..., 0]
        return logits


class _One(nn.Module):
    """One of two streams alone."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, mfcc: Tensor, whisper: Tensor, mask: Tensor) -> Tensor:
        return (mfcc, whisper)[self.which]


@dataclass(frozen=True, kw_only=True)
class FrameTask(FieldTask):
    """Frames of 20 ms are speech or not.

    Attributes:
        whisper: a published model of Whisper's kind.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("der", "detection error rate", "errors/speech",
               what="frames missed and falsely found, by the number of frames of speech; threshold 0.5"),
        Metric("auc", "AUROC of frames", higher=True, kind="share", floor=0.5),
        Metric("f1", "F1 of frames", higher=True, kind="share"),
        Metric("miss", "speech that is missed", kind="share"),
        Metric("false_alarm", "silence that is taken for speech", kind="share"),
        Metric("frame_nll", "held-out loss, nats/frame", "nats/frame"),
    )  # fmt: skip
    references: ClassVar[tuple[str, ...]] = ("whisper", "mfcc")

    whisper: str = "whisper-tiny.en"

    def around(self, blocks: Sequence[nn.Module], size: int = 0, width: int = 0) -> nn.Module:
        """A fusion, the one block, in the task's model; ``size`` is of what it gives, ``width`` the LSTM's."""
        (fusion,) = blocks
        return VadModel(fusion, size or self.dim, self.dim, self.states, width or self.dim, self.layers, self.dropout)

    @property
    def states(self) -> int:
        """Features of Whisper's states."""
        return width_of(self.whisper)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return self.around([_One(int((kind or self.references[0]) == "whisper"))], width=width)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["inputs"], batch["states"], batch["mask"]).float()
        losses = binary_cross_entropy_with_logits(logits, batch["targets"], reduction="none")
        mean: Tensor = losses[batch["mask"]].mean()
        return mean

    def predict(self, model: nn.Module, batch: Batch) -> list[Activity]:
        speech = model(batch["inputs"], batch["states"], batch["mask"]).float().sigmoid().cpu()
        return [Activity(row[:count]) for row, count in zip(speech, batch["mask"].sum(1).tolist(), strict=True)]

    def score(self, sample: Sample, said: Activity) -> Mapping[str, float]:
        try:
            from torchmetrics.functional.classification import binary_auroc
        except ImportError as error:
            raise UserError("AUROC needs torchmetrics: pip install 'manyheads[train]'") from error
        there, found = sample.target.numpy(), (said.speech >= 0.5).numpy()
        missed, false, both = (int(x.sum()) for x in (there & ~found, ~there & found, there & found))
        sure = said.speech.double().clamp(1e-6, 1 - 1e-6)
        right = torch.where(sample.target, sure, 1 - sure)
        odds = sure.logit().mul(1000).round() / 1000  # frames that differ by rounding alone are tied
        return {
            "der": (missed + false) / there.sum(), "auc": float(binary_auroc(odds.sigmoid(), sample.target.int())),
            "f1": 2 * both / (2 * both + missed + false), "miss": missed / there.sum(),
            "false_alarm": false / (~there).sum(), "frame_nll": float(-right.log().mean()),
        }  # fmt: skip

    def truth(self, sample: Sample) -> Activity:
        return Activity(sample.target.float())

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        """What is said of the first recording, under its labels."""
        sample, one = samples[0], said[0]
        columns = [f"{_SECONDS * i:.2f}" for i in range(len(one.speech))]
        rows = [sample.target.float().tolist(), one.speech.tolist()]
        return (Picture(f"speech: {sample.name}", ["labels", "found"], columns, rows, ("speech", "seconds")),)
