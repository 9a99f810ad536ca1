# SPDX-License-Identifier: Apache-2.0
"""Shares ranked by the return of the next period, and the portfolio of the best, fold after fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.stocks import read_shares, stock_folder, stocks
from ...errors import UserError
from ...experiment import Metric, seeding
from ...recipe import Batch, Picture, Sample
from .._field import MODEL_METRICS
from .._statistics import rank_correlation
from ._forecast import Table, WalkForward
from ._panels import HISTORY, PERIODS, CrossSection, Outcome, cross_sections, peaks, quantile_classes
from ._portfolio import figures, held, portfolio
from ._returns import LastToken, Recurrent

__all__ = ["EachShare", "Ranking", "StockRanking"]

Array = NDArray[np.float64]
FEATURES = 2  # of a period: return, turnover
_SEASON = 12  # periods between the last one and the one that "season" is
_TOGETHER = 4  # periods of a block that intervals count
_FIGURES = (
    Metric("turnover", "bought anew", kind="share", what="of the worth, at the start of a period"),
    Metric("annual_return", "annual return, %", "%", higher=True, what="after costs"),
    Metric("sharpe", "Sharpe ratio", higher=True, what="of a year, after costs, without a riskless rate"),
    Metric("drawdown", "maximum drawdown, %", "%", what="after costs, from a peak of the test part to its trough"),
)


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
        said = self.model(inputs[mask])
        out = said.new_zeros(*mask.shape, said.shape[-1])
        out[mask] = said
        return out


@dataclass(frozen=True, kw_only=True)
class StockRanking(WalkForward):
    """Which of many shares gain most in the next period; a sample is one date, with all shares that there are.

    A model reads the last periods of each share, return and turnover, as z-scores over all shares of the date, so that
    what the market does is not seen. It says a class of the next return: each of ``classes`` has ``top`` of the shares,
    those between classes have none (Quantformer's labels). Shares are ranked by the probability of the highest class,
    the ``top`` of them are held in equal parts, and every period the portfolio is put together anew. Intervals are over
    blocks of four periods. ``turnover``, ``annual_return``, ``sharpe`` and ``drawdown`` are of all dates together: a
    date's value is its part in the figure, see :func:`._portfolio.figures`.

    Attributes:
        source_of: ``sectors`` (88 shares, five years), ``decade`` (10 shares), or ``peaks``, made here, whose returns
            follow those of the week of most volume.
        period: ``week``, ``month`` or ``day``.
        history: periods that are read.
        classes: of returns.
        top: share of the shares in a class, and of those that are held.
        cost: of what is bought and of what is sold.
        drawn: shares of a date of a training step, at most.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("excess", "gain over all shares, %", "% a period", higher=True,
               what="after costs, over all shares in equal parts without costs"),
        Metric("ic", "rank correlation with returns", higher=True, what="Spearman's, of the shares of a date"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[str] = (
        "a folder of CSV files, one a share, with the columns date, open, high, low, close, volume; `predict` reads "
        "such a folder, or a CSV file of several shares with a column ticker"
    )
    references: ClassVar[tuple[str, ...]] = ("gru_of_quantiles",)
    blocks: ClassVar[int] = 6

    dim: int = 16
    layers: int = 2
    dropout: float = 0.0
    width: int = 64
    samples_judged: int = 10_000
    source_of: str = "peaks"
    period: Literal["week", "month", "day"] = "week"
    history: int = HISTORY
    classes: int = 3
    top: float = 0.2
    cost: float = 0.003
    drawn: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_of not in ("sectors", "decade", "peaks"):
            raise UserError(f"there are no shares {self.source_of!r}; there are sectors, decade, peaks")
        if self.period not in PERIODS or not _SEASON < self.history <= HISTORY:
            raise UserError(f"period is {', '.join(PERIODS)}, history {_SEASON + 1} to {HISTORY} periods")
        if self.classes < 2 or not 0 < self.top * self.classes <= 1 + 1e-9 or not 0 <= self.cost < 1 or self.drawn < 2:
            raise UserError("classes are 2 or more of which each has a share top, 1 together at most; cost is a share")

    @property
    def label(self) -> str:
        return self.named or f"{Path(self.folder).name if self.folder else self.source_of}, fold {self.fold}"

    @property
    def source(self) -> str:
        return f"{self.folder or self.source_of} by {self.period}"

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.metrics, *_FIGURES, *MODEL_METRICS)

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        name, _, period = str(folder or f"{cls.source_of} by {cls.period}").rpartition(" by ")
        shares = (
            peaks() if name == "peaks" else stocks(name) if name in ("sectors", "decade") else stock_folder(Path(name))
        )
        dates = [(section, outcome) for section, outcome in cross_sections(shares, period) if outcome is not None]
        found = []
        for i, (section, outcome) in enumerate(dates):
            block, first = i * cls.blocks // len(dates), dates[i - i % _TOGETHER][0].date
            part, about = cls.part_of(block) or "train", {"context": f"{period}s from {first}"}
            found.append(Sample(section.date, f"block {block}", part, section, outcome, about))
        return [found[i] for i in seeding.generator(0, shares=name).permutation(len(found))]

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", read_shares(path))

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        found = []
        for i in rng.integers(0, len(samples), self.batch):
            there = np.flatnonzero(samples[i].inputs.there)
            some = rng.choice(there, min(self.drawn, len(there)), replace=False)
            found.append(replace(samples[i], inputs=samples[i].inputs.among(some)))
        return found

    def collate(self, samples: Sequence[Sample]) -> Batch:
        sections = [self._section(sample) for sample in samples]
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

    def _section(self, sample: Sample) -> CrossSection:
        """That of a sample; of a file of the user's its last one."""
        if isinstance(sample.inputs, CrossSection):
            return sample.inputs
        *_, (section, _) = cross_sections(sample.inputs, self.period)
        return section

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
            self._ranking(section, row[: section.there.sum()])
            for section, row in zip(batch["sections"], best, strict=True)
        ]

    def _ranking(self, section: CrossSection, values: Array) -> Ranking:
        scores = np.full(len(section.names), np.nan)
        scores[section.there] = values
        return Ranking(section.names, scores, self.top)

    def score(self, sample: Sample, said: Ranking) -> Mapping[str, float]:
        found = self.scores([sample], [said])[0]
        return {metric.name: found[metric.name] for metric in self.metrics}

    def scores(self, samples: Sequence[Sample], said: Sequence[Ranking]) -> Sequence[Mapping[str, float]]:
        """Of dates in their order, each with the portfolio that the one before left."""
        order = sorted(range(len(samples)), key=lambda i: samples[i].name)
        net, bought = self._course([samples[i] for i in order], [said[i] for i in order])
        together = figures(net, PERIODS[self.period])
        found: list[dict[str, float]] = [{} for _ in samples]
        for t, i in enumerate(order):
            returns, scores = _known(samples[i], said[i])
            known = np.isfinite(returns)
            correlation = rank_correlation(returns[known], np.nan_to_num(scores[known], nan=-1e9))
            found[i] = {
                "excess": 100 * float(net[t]) - float(returns[known].mean()),
                "ic": correlation if np.isfinite(correlation) else 0.0, "turnover": float(bought[t].clip(max=1)),
                **{name: float(values[t]) for name, values in together.items()},
            }  # fmt: skip
        return found

    def _course(self, samples: Sequence[Sample], said: Sequence[Ranking]) -> tuple[Array, Array]:
        """What the portfolio earns at each date, and what is bought."""
        pairs = [_known(sample, one) for sample, one in zip(samples, said, strict=True)]
        weights = [held(np.where(np.isfinite(returns), scores, np.nan), self.top) for returns, scores in pairs]
        return portfolio(weights, [returns / 100 for returns, _ in pairs], self.cost)

    def truth(self, sample: Sample) -> Ranking:
        return Ranking(sample.inputs.names, sample.target.returns, self.top)

    def table(self, sample: Sample) -> Table:
        section: CrossSection = sample.inputs
        returns = sample.target.returns[section.there]
        rows = section.rows[section.there, -self.history :].transpose(0, 2, 1).reshape(len(returns), -1)
        ago = [str(k) for k in reversed(range(self.history))]
        names = [f"return {k}" for k in ago] + [f"turnover {k}" for k in ago]
        names[names.index("return 0")], names[names.index(f"return {_SEASON}")] = "last", "season"
        known = np.isfinite(returns)
        targets = np.where(known, returns - returns[known].mean(), 0.0)
        return Table(tuple(names), rows, np.zeros(len(rows), np.int64), np.zeros(len(rows)), targets)

    def told(self, sample: Sample, values: Array) -> Ranking:
        return self._ranking(sample.inputs, values)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Ranking]) -> Sequence[Picture]:
        order = sorted(range(len(samples)), key=lambda i: samples[i].name)
        dates = [samples[i] for i in order]
        net, _ = self._course(dates, [said[i] for i in order])
        everything = np.array([np.nanmean(sample.target.returns) / 100 for sample in dates])
        rows = {"all shares, without costs": everything, f"the best {100 * self.top:g} %, after costs": net}
        courses = [np.concatenate(([1.0], np.cumprod(1 + values))).tolist() for values in rows.values()]
        title = f"worth of 1, {100 * self.cost:g} % for each purchase and sale"
        columns = [str(k) for k in range(len(dates) + 1)]
        return [Picture(title, list(rows), columns, courses, ("worth", f"{self.period}s of the test"), kind="lines")]


def _known(sample: Sample, said: Ranking) -> tuple[Array, Array]:
    """Returns of the shares that are there, NaN for others; and what was said."""
    outcome: Outcome = sample.target
    return np.where(sample.inputs.there, outcome.returns, np.nan), said.scores
