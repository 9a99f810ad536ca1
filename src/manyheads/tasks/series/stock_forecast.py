# SPDX-License-Identifier: Apache-2.0
"""The price of a share on the next trading day, forecast by what was known at the close before, fold after fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...data.stocks import Prices, read_prices
from ...errors import UserError
from ...experiment import Metric, seeding
from ...recipe import Picture, Sample
from ._portfolio import wealth, worth_picture
from ._returns import ReturnForecast, ReturnTask, Window, features

__all__ = ["StockForecast"]

_LONGEST = 40  # days of a history that are kept
_COST = 0.001  # of what is bought or sold, in the picture


@dataclass(frozen=True, kw_only=True)
class StockForecast(ReturnTask):
    """Log returns of the next day, in per cent; walk-forward folds of all shares together.

    All days of all shares are ten blocks of time with the same cuts for every share, see :class:`WalkForward`. What a
    day is forecast by may lie in an earlier block, what is forecast never does. Returns and
    ranges are divided by the deviation of the returns of the last 40 days: no scale is taken from elsewhere. Every day
    of the test is judged. Intervals are over weeks, in which shares move together.

    ``accuracy`` is the paper's figure, 1 - |forecast - price| / price, on which "as today" has 98 %: compare arms.

    Attributes:
        source_of: ``year`` (12 shares), ``decade`` (10), or ``echo``, made here, whose returns repeat after 25 days.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("mae", "absolute error of the price", "%", what="of the logarithm of the next day's price"),
        Metric("direction", "right directions", higher=True, kind="share", what="a forecast of no change has none"),
        Metric("accuracy", "1 - relative error of the price", higher=True, kind="share"),
    )
    files: ClassVar[tuple[str, ...]] = ("stocks", "stock-prediction-models")
    takes: ClassVar[str] = "a folder of CSV files, one a share, with the columns date, open, high, low, close, volume"
    sets: ClassVar[tuple[str, ...]] = ("year", "decade", "echo")

    dim: int = 32
    layers: int = 1
    width: int = 96
    samples_judged: int = 10_000
    source_of: str = "year"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.history <= _LONGEST:
            raise UserError(f"history is 2 to {_LONGEST} days")

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        name = str(folder or cls.source_of)
        shares = cls.shares(name)
        days = np.concatenate([one.dates.astype(float) for one in shares])
        cuts = np.quantile(days, np.linspace(0, 1, cls.blocks + 1))
        found: list[Sample] = []
        for share in shares:
            returns = 100 * share.log_returns()
            for day in range(_LONGEST, len(returns)):
                date = share.dates[day + 1]
                block = int(np.clip(np.searchsorted(cuts, float(date.astype(float)), "right") - 1, 0, cls.blocks - 1))
                window = _window(share, day)
                found.append(
                    Sample(
                        f"{share.name} {date}", f"block {block}", cls.part_of(block) or "train", window, (returns[day],)
                    )
                )
        order = seeding.generator(0, shares=name).permutation(len(found))
        return [found[i] for i in order]

    @classmethod
    def open(cls, path: Path) -> Sample:
        share = read_prices(path)
        return Sample(path.name, "", "test", _window(share, len(share.dates) - 1))

    def context(self, sample: Sample) -> str:
        week: str = str(np.datetime64(sample.inputs.date, "W"))
        return week

    def score(self, sample: Sample, said: ReturnForecast) -> Mapping[str, float]:
        (right,) = sample.target
        relative = abs(np.expm1((said.percent - right) / 100))
        return {
            "mae": abs(said.percent - right), "direction": float(np.sign(said.percent) == np.sign(right)),
            "accuracy": max(0.0, 1 - relative),
        }  # fmt: skip

    def pictures(self, samples: Sequence[Sample], said: Sequence[ReturnForecast]) -> Sequence[Picture]:
        share = min(sample.name for sample in samples).rpartition(" ")[0]
        days = sorted((s.inputs.date, i) for i, s in enumerate(samples) if s.name.rpartition(" ")[0] == share)
        closes = np.array([samples[i].inputs.close for _, i in days])
        held = wealth(closes, np.ones(len(days)), 0.0)
        own = wealth(closes, np.array([float(said[i].percent > 0) for _, i in days]), _COST)
        courses = {"held throughout": held, "held where a rise is forecast": own}
        return [worth_picture(courses, _COST, "days that are judged", of=f"{share}: ")]


def _window(share: Prices, day: int) -> Window:
    """What is known at the close of ``dates[day]``."""
    first = max(0, day - _LONGEST)
    rows, deviation = features(share, first, day)
    return Window(rows, deviation, float(share.column("adjusted")[day]), str(share.dates[day]))
