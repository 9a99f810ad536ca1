# SPDX-License-Identifier: Apache-2.0
"""Rankings of shares: what a model reads of a date, models of one share, their loss, what they say, rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...recipe import Batch, Sample
from ._forecast import Array, Table, WalkForward
from ._panels import HISTORY, CrossSection, cross_sections, quantile_classes
from ._portfolio import held
from ._returns import LastToken, Recurrent

__all__ = ["SEASON", "EachShare", "Ranking", "RankingTask"]

FEATURES = 2  # of a period: return, turnover
SEASON = 12  # periods between the last one and the one that "season" is


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Shares in an order.

    Attributes:
        names: of all shares of the set.
        scores: higher for what is held rather, ``[S]``; NaN where a share is not there.
        share: of the shares that is held.
    """

    names: tuple[str, ...]
    scores: Array
    share: float

    def __str__(self) -> str:
        order = np.argsort(-np.nan_to_num(self.scores, nan=-np.inf), kind="stable")[: np.isfinite(self.scores).sum()]
        many = (held(self.scores, self.share) > 0).sum()
        said = [f"{self.names[i]} {self.scores[i]:.3g}" for i in order]
        return f"hold {', '.join(said[:many])}; not {', '.join(said[many:])}"


class EachShare(nn.Module):
    """A model of one share ``[n, L, 2] -> [n, classes]`` for shares of several dates, ``[B, S, L, 2]``, each by itself.

    ``forward(inputs, mask [B, S]) -> [B, S, classes]``, 0 where no share is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        said: Tensor = self.model(inputs[mask])
        out = said.new_zeros(*mask.shape, said.shape[-1])
        out[mask] = said
        return out


@dataclass(frozen=True, kw_only=True)
class RankingTask(WalkForward):
    """Base of tasks that rank shares by classes of their next return; inputs are :class:`._panels.CrossSection`.

    Attributes:
        period: ``week``, ``month`` or ``day``.
        history: periods that are read.
        classes: of returns, the highest first.
        top: share of the shares in a class, and of those that are held.
    """

    period: Literal["week", "month", "day"] = "week"
    history: int = HISTORY
    classes: int = 5
    top: float = 0.2

    def collate(self, samples: Sequence[Sample]) -> Batch:
        sections = [_section(sample, self.period) for sample in samples]
        at = [np.flatnonzero(section.there) for section in sections]
        inputs = torch.zeros(len(samples), max(map(len, at)), self.history, FEATURES)
        labels = torch.full(inputs.shape[:2], -1)
        for b, (sample, section, some) in enumerate(zip(samples, sections, at, strict=True)):
            inputs[b, : len(some)] = torch.from_numpy(section.rows[some, -self.history :])
            if sample.target is not None:
                found = quantile_classes(sample.target.places[some], self.classes, self.top)
                labels[b, : len(some)] = torch.from_numpy(found)
        mask = torch.arange(inputs.shape[1])[None] < torch.tensor([[len(some)] for some in at])
        return {"inputs": inputs, "mask": mask, "labels": labels, "sections": sections}

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return EachShare(LastToken(blocks, self.dim, self.history, FEATURES, self.classes))

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return EachShare(Recurrent("gru", self.dim, width, 1, self.dropout, FEATURES, self.classes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, labels = model(batch["inputs"], batch["mask"]).float(), batch["labels"]
        found: Tensor = cross_entropy(logits[labels >= 0], labels[labels >= 0])
        return found

    def predict(self, model: nn.Module, batch: Batch) -> list[Ranking]:
        best = model(batch["inputs"], batch["mask"]).float().softmax(-1)[..., 0].cpu().double().numpy()
        return [
            _ranking(section, row[: section.there.sum()], self.top)
            for section, row in zip(batch["sections"], best, strict=True)
        ]

    def truth(self, sample: Sample) -> Ranking:
        return Ranking(sample.inputs.names, sample.target.returns, self.top)

    def table(self, sample: Sample) -> Table:
        section: CrossSection = sample.inputs
        returns = sample.target.returns[section.there]
        rows = section.rows[section.there, -self.history :].transpose(0, 2, 1).reshape(len(returns), -1)
        ago = [str(k) for k in reversed(range(self.history))]
        names = [f"return {k}" for k in ago] + [f"turnover {k}" for k in ago]
        names[names.index("return 0")], names[names.index(f"return {SEASON}")] = "last", "season"
        known = np.isfinite(returns)
        targets = np.where(known, returns - returns[known].mean(), 0.0)
        return Table(tuple(names), rows, np.zeros(len(rows), np.int64), np.zeros(len(rows)), targets)

    def told(self, sample: Sample, values: Array) -> Ranking:
        return _ranking(sample.inputs, values, self.top)


def _section(sample: Sample, period: str) -> CrossSection:
    """That of a sample; of a file of the user's its last one."""
    if isinstance(sample.inputs, CrossSection):
        return sample.inputs
    *_, (section, _) = cross_sections(sample.inputs, period)
    return section


def _ranking(section: CrossSection, values: Array, top: float) -> Ranking:
    """Scores of the shares that are there ``[n]``."""
    scores = np.full(len(section.names), np.nan)
    scores[section.there] = values
    return Ranking(section.names, scores, top)
