# SPDX-License-Identifier: Apache-2.0
"""Encoders of a whole recording with their poolings, and the base of a task that compares two recordings."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear, normalize

from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from .._blocks import Transformer
from .._folds import FoldedTask
from .._rates import detection_cost, eer_errors
from ._encoder import SpeechEncoder

__all__ = [
    "AttentiveStatistics", "Classified", "CosineClassifier", "Match", "MeanPool", "SpeakerEncoder", "VerificationTask",
]  # fmt: skip

_KINDS = ("target", "phrase", "speaker")  # same of both; the same speaker's other order; the other speaker's same
_BINS = 20
_SCALE = 10.0  # of cosines; with some hundred classes a class can reach a probability of 0.99


class MeanPool(nn.Module):
    """The mean over frames ``[B, T, dim]`` where speech is, ``[B, dim]``."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, dim]``."""
        there = mask[..., None].to(x.dtype)
        mean: Tensor = (x * there).sum(1) / there.sum(1)
        return mean


class AttentiveStatistics(nn.Module):
    """Mean and deviation over frames, weighted by additive attention (Okabe et al., arXiv 1803.10963)."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, T, dim]`` -> ``[B, 2 dim]``; all frames are there where no mask is given."""
        scores = self.score(x)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], float("-inf"))
        weights = scores.softmax(1)
        mean = (weights * x).sum(1)
        variance = (weights * (x - mean[:, None]).square()).sum(1)
        return torch.cat((mean, variance.clamp(min=1e-6).sqrt()), -1)


class SpeakerEncoder(SpeechEncoder):
    """Frames ``[B, T, 40]`` and mask ``[B, T]`` -> states ``[B, n, dim]``, whose mean is the embedding."""

    def __init__(
        self, blocks: Sequence[nn.Module], dim: int, dropout: float, pool: nn.Module, head: nn.Module | None = None
    ) -> None:
        super().__init__(blocks, dim, 1, dropout, positions=True)
        self.pool, self.head = pool, head or nn.Identity()  # type: ignore[assignment]

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """States; n is 1 here."""
        pooled: Tensor = self.head(self.pool(*self.encode(frames, mask)))
        return pooled[:, None]


class CosineClassifier(nn.Module):
    """Scaled cosines with a vector of each class (NormFace, arXiv 1704.06369): pairs are judged by cosines too."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``[B, dim]``."""
        return _SCALE * linear(normalize(x, dim=-1), normalize(self.weight, dim=-1))


class Classified(nn.Module):
    """An encoder and a layer to the classes that it is trained by."""

    def __init__(self, model: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.model, self.head = model, CosineClassifier(dim, classes)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of the first state."""
        logits: Tensor = self.head(self.model(frames, mask)[:, 0])
        return logits


@dataclass(frozen=True)
class Match:
    """How alike two recordings are.

    Attributes:
        cosine: of their embeddings; it is compared with that of other pairs, no threshold is built in.
    """

    cosine: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.3f}"


@dataclass(frozen=True, kw_only=True)
class VerificationTask(FoldedTask):
    """Pairs are judged by the cosine of two embeddings; a fold is of the speakers that are tested."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("eer", "equal error rate", kind="share", floor=0.5,
               what="pairs taken wrongly at the threshold at which as many targets are refused as others accepted"),
        Metric("phrase_eer", "EER against the reversed phrase", kind="share", floor=0.5,
               what="targets against the same speaker's same digits in the other order"),
        Metric("min_dcf", "minDCF", "cost", what="least detection cost, prior of a target 0.1; 1 is to refuse all"),
        Metric("speaker_eer", "EER against another speaker", kind="share", floor=0.5,
               what="targets against the other unseen speaker's same phrase"),
    )  # fmt: skip
    references: ClassVar[tuple[str, ...]] = ("mean_pooling", "attentive_statistics")
    together: ClassVar[int] = 2

    @property
    @abstractmethod
    def classes(self) -> int:
        """Classes that are trained on."""

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return SpeakerEncoder(blocks, self.dim, self.dropout, MeanPool())

    def reference(self, width: int, kind: str = "") -> nn.Module:
        blocks = [Transformer(self.dim, self.heads, width, self.dropout) for _ in range(self.layers)]
        if (kind or self.references[0]) == "mean_pooling":
            return self.around(blocks)
        pool = AttentiveStatistics(self.dim)  # no bias behind it: what all embeddings share tells none apart
        return SpeakerEncoder(blocks, self.dim, self.dropout, pool, nn.Linear(2 * self.dim, self.dim, bias=False))

    def learner(self, model: nn.Module) -> Classified:
        return Classified(model, self.dim, self.classes)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["inputs"].flatten(0, 1), batch["mask"].flatten(0, 1))
        return cross_entropy(logits.float(), batch["targets"].flatten())

    def predict(self, model: nn.Module, batch: Batch) -> list[Match]:
        states = model(batch["inputs"].flatten(0, 1), batch["mask"].flatten(0, 1))
        one, other = states.float().mean(1).unflatten(0, (-1, 2)).unbind(1)
        return [Match(cosine) for cosine in cosine_similarity(one, other, dim=-1).tolist()]

    def score(self, sample: Sample, said: Match) -> Mapping[str, float]:
        """Of one pair alone there is no threshold: how far its cosine, 0 at least, is from 1 or 0."""
        far = abs(float(sample.target) - min(1.0, max(0.0, said.cosine)))
        return {metric.name: far for metric in self.metrics}

    def scores(self, samples: Sequence[Sample], said: Sequence[Match]) -> list[Mapping[str, float]]:
        found: list[dict[str, float]] = [{} for _ in samples]
        all_scores, right = np.array([one.cosine for one in said]), np.array([bool(s.target) for s in samples])
        kinds = np.array([sample.about["kind"] for sample in samples])
        for name, others in (("eer", _KINDS[1:]), ("phrase_eer", _KINDS[1:2]), ("min_dcf", _KINDS[1:]),
                             ("speaker_eer", _KINDS[2:])):  # fmt: skip
            which = np.flatnonzero(right | np.isin(kinds, others))
            if 0 < right[which].sum() < len(which):
                values = (detection_cost if name == "min_dcf" else eer_errors)(all_scores[which], right[which])
                for i, value in zip(which, values, strict=True):
                    found[i][name] = float(value)
        return list(found)

    def truth(self, sample: Sample) -> Match:
        return Match(float(sample.target))

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        """Shares of cosines by kind of pair."""
        names = {"target": "same", "phrase": "reversed phrase", "speaker": "other speaker"}
        edges = np.linspace(-1, 1, _BINS + 1)
        kinds = np.array([sample.about["kind"] for sample in samples])
        cosines = np.array([one.cosine for one in said]).clip(-1, 1)
        rows = [kind for kind in _KINDS if (kinds == kind).any()]
        shares = [np.histogram(cosines[kinds == kind], edges)[0] / (kinds == kind).sum() for kind in rows]
        columns = [f"{left:.1f}" for left in edges[:-1]]
        return (
            Picture("cosines of pairs", [names[kind] for kind in rows], columns, shares, ("pairs", "cosine, from")),
        )
