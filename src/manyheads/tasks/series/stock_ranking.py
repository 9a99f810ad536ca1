# SPDX-License-Identifier: Apache-2.0
"""Shares ranked by the return of the next period, and the portfolio of the best, fold after fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...data.stocks import read_shares
from ...errors import UserError
from ...experiment import Metric, seeding
from ...recipe import Picture, Sample
from .._field import MODEL_METRICS
from .._statistics import rank_correlation
from ._forecast import Array
from ._panels import HISTORY, PERIODS, Outcome, cross_sections, quantile_classes
from ._portfolio import figures, held, portfolio, worth_picture
from ._rankings import SEASON, Ranking, RankingTask

__all__ = ["StockRanking"]

_TOGETHER = 4  # periods of a block that intervals count
_FIGURES = (
    Metric("gross", "gain before costs, %", "% a period", higher=True, what="over all shares in equal parts"),
    Metric("turnover", "bought anew", kind="share", what="of the worth, at the start of a period"),
    Metric("annual_return", "annual return, %", "%", higher=True, what="after costs"),
    Metric("sharpe", "Sharpe ratio", higher=True, what="of a year, after costs, without a riskless rate"),
    Metric("drawdown", "maximum drawdown, %", "%", what="after costs, peak to trough; its interval may pass 0"),
)


@dataclass(frozen=True, kw_only=True)
class StockRanking(RankingTask):
    """Which of many shares gain most in the next period; a sample is one date, with all shares that there are.

    A model reads the last periods of each share, return and turnover, as z-scores over all shares of the date, so that
    what the market does is not seen. It says a class of the next return: each of ``classes`` has ``top`` of the shares,
    those between classes have none (Quantformer's labels). Shares are ranked by the probability of the highest class,
    the ``top`` of them are held in equal parts, and every period the portfolio is put together anew. A share whose next
    return is not known is not held. Intervals are over
    blocks of four periods. ``turnover``, ``annual_return``, ``sharpe`` and ``drawdown`` are of all dates together: a
    date's value is its part in the figure, see :func:`._portfolio.figures`.

    Attributes:
        source_of: ``sectors`` (88 shares, five years), ``decade`` (10 shares), or ``peaks``, made here, whose returns
            follow those of the week of most volume.
        cost: of what is bought and of what is sold.
        drawn: shares of a date of a training step, at most.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("precision", "held shares of the highest class", higher=True, kind="share",
               what="of those that are held; chance has as many as are held of all"),
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
    sets: ClassVar[tuple[str, ...]] = ("sectors", "decade", "peaks")

    dim: int = 16
    layers: int = 2
    dropout: float = 0.0
    width: int = 64
    samples_judged: int = 10_000
    source_of: str = "peaks"
    cost: float = 0.003
    drawn: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period not in PERIODS or not SEASON < self.history <= HISTORY:
            raise UserError(f"period is {', '.join(PERIODS)}, history {SEASON + 1} to {HISTORY} periods")
        if self.classes < 2 or not 0 < self.top * self.classes <= 1 + 1e-9 or not 0 <= self.cost < 1 or self.drawn < 2:
            raise UserError("classes are 2 or more of which each has a share top, 1 together at most; cost is a share")

    @property
    def source(self) -> str:
        return f"{super().source} by {self.period}"

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.metrics, *_FIGURES, *MODEL_METRICS)

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        name, _, period = str(folder or f"{cls.source_of} by {cls.period}").rpartition(" by ")
        every = cross_sections(cls.shares(name), period)
        dates = [(section, outcome) for section, outcome in every if outcome is not None]
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

    def score(self, sample: Sample, said: Ranking) -> Mapping[str, float]:
        found = self.scores([sample], [said])[0]
        return {metric.name: found[metric.name] for metric in self.metrics}

    def scores(self, samples: Sequence[Sample], said: Sequence[Ranking]) -> Sequence[Mapping[str, float]]:
        """Of dates in their order, each with the portfolio that the one before left."""
        order = sorted(range(len(samples)), key=lambda i: samples[i].name)
        weights, net, bought = _course(self, [samples[i] for i in order], [said[i] for i in order])
        together = figures(net, PERIODS[self.period])
        found: list[dict[str, float]] = [{} for _ in samples]
        for t, i in enumerate(order):
            returns, scores = _known(samples[i], said[i])
            known = np.isfinite(returns)
            best = quantile_classes(samples[i].target.places, self.classes, self.top) == 0
            correlation = rank_correlation(returns[known], np.nan_to_num(scores[known], nan=-1e9))
            mean = float(returns[known].mean())
            found[i] = {
                "precision": float(weights[t][best].sum().clip(max=1)),
                "excess": 100 * float(net[t]) - mean, "gross": float(weights[t][known] @ returns[known]) - mean,
                "ic": correlation if np.isfinite(correlation) else 0.0, "turnover": float(bought[t].clip(max=1)),
                **{name: float(values[t]) for name, values in together.items()},
            }  # fmt: skip
        return found

    def pictures(self, samples: Sequence[Sample], said: Sequence[Ranking]) -> Sequence[Picture]:
        order = sorted(range(len(samples)), key=lambda i: samples[i].name)
        dates = [samples[i] for i in order]
        _, net, _ = _course(self, dates, [said[i] for i in order])
        everything = np.array([np.nanmean(sample.target.returns) / 100 for sample in dates])
        rows = {"all shares, without costs": everything, f"the best {100 * self.top:g} %, after costs": net}
        courses = {name: np.append(1.0, np.cumprod(1 + values)) for name, values in rows.items()}
        return [worth_picture(courses, self.cost, f"{self.period}s of the test")]


def _known(sample: Sample, said: Ranking) -> tuple[Array, Array]:
    """Returns of the shares that are there, NaN for others; and what was said."""
    outcome: Outcome = sample.target
    return np.where(sample.inputs.there, outcome.returns, np.nan), said.scores


def _course(task: StockRanking, samples: Sequence[Sample], said: Sequence[Ranking]) -> tuple[list[Array], Array, Array]:
    """What is held from each date on, what it earns, and what is bought."""
    pairs = [_known(sample, one) for sample, one in zip(samples, said, strict=True)]
    weights = [held(np.where(np.isfinite(returns), scores, np.nan), task.top) for returns, scores in pairs]
    return weights, *portfolio(weights, [returns / 100 for returns, _ in pairs], task.cost)
