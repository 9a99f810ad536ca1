# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that forecast: parts by time, a table for forecasters that are no networks, and pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...data.stocks import Prices, stock_folder, stocks
from ...errors import UserError
from ...recipe import Part, Sample
from .._field import FieldTask

__all__ = ["SHARES", "ForecastTask", "Table", "WalkForward", "cut_times"]

Array = NDArray[np.float64]
SHARES = (0.6, 0.8)  # of the time, where training ends, and where validation does


def cut_times(entities: Sequence[Array]) -> dict[Part, tuple[float, float]]:
    """First time and end of each part, the same for all entities: training, then validation, then the test.

    Args:
        entities: times of the observations of each; the parts have shares by :data:`SHARES` of the stretch that all
            entities have, or of all observations where that is less than half of what an entity has.
    """
    first, last = max(times[0] for times in entities), min(times[-1] for times in entities)
    if last - first >= 0.5 * min(times[-1] - times[0] for times in entities):
        ends = [first + share * (last - first) for share in SHARES]
    else:
        ends = [float(np.quantile(np.concatenate(entities), share)) for share in SHARES]
    return {"train": (-np.inf, ends[0]), "validation": (ends[0], ends[1]), "test": (ends[1], np.inf)}


@dataclass(frozen=True)
class Table:
    """Forecasts as rows, one for each number that is forecast, for models that read a row by itself.

    Attributes:
        names: of the columns; ``last`` and ``season`` are forecasts themselves: the last value, the one of a season
            before.
        features: what is known when the forecast is made, ``[n, columns]``.
        kinds: which variable a row is of, int64 ``[n]``: each has a model of its own.
        level: from where targets are counted ``[n]``: what a model of rows says is added to it.
        targets: what is right ``[n]``, NaN where it is not known.
    """

    names: tuple[str, ...]
    features: Array
    kinds: NDArray[np.int64]
    level: Array
    targets: Array

    def column(self, name: str) -> Array:
        """One of the columns, ``[n]``."""
        found: Array = self.features[:, self.names.index(name)]
        return found


@dataclass(frozen=True, kw_only=True)
class ForecastTask(FieldTask):
    """Base of tasks that forecast."""

    @abstractmethod
    def table(self, sample: Sample) -> Table:
        """The numbers that a sample asks for, one a row."""

    def fitting(self) -> Sequence[Sample]:
        """All samples of the training part that have a table, for models that are fitted to all at once."""
        return replace(self, samples_judged=2**31).judged("train")

    @abstractmethod
    def told(self, sample: Sample, values: Array) -> Any:
        """The prediction that the numbers ``[n]`` of a sample's table make."""


@dataclass(frozen=True, kw_only=True)
class WalkForward(ForecastTask):
    """Base of forecasts of shares in walk-forward folds: blocks of time, each of which is a group, ``block k``.

    Fold 0 tests on the last block, fold 1 on the one before; the block before the test validates, earlier ones are
    trained on, later ones are left out.

    Attributes:
        source_of: one of :attr:`sets`.
        fold: how many blocks before the last one is tested on.
    """

    blocks: ClassVar[int] = 10
    sets: ClassVar[tuple[str, ...]]  # those of :mod:`manyheads.data.stocks` that will do

    source_of: str = ""
    fold: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_of not in self.sets:
            raise UserError(f"there are no shares {self.source_of!r}; there are {', '.join(self.sets)}")
        if not 0 <= self.fold <= self.blocks - 3:
            raise UserError(f"fold is 0 to {self.blocks - 3}")

    @property
    def label(self) -> str:
        return f"{Path(self.folder).name if self.folder else self.source_of}, fold {self.fold}"

    @property
    def source(self) -> str:
        return self.folder or self.source_of

    @classmethod
    def shares(cls, source: str) -> Sequence[Prices]:
        """Those of a set, or of a folder of the user's."""
        return stocks(source) if source in cls.sets else stock_folder(Path(source))

    @classmethod
    def part_of(cls, block: int, fold: int = 0) -> Part | None:
        """The part of a block of time in a fold, None where it comes after the test."""
        last = cls.blocks - 1 - fold
        return "train" if block < last - 1 else "validation" if block == last - 1 else "test" if block == last else None

    def samples(self, part: Part) -> Sequence[Sample]:
        if not self.fold:
            return super().samples(part)
        every = [s for one in ("train", "validation", "test") for s in super(WalkForward, self).samples(one)]
        return [replace(s, part=part) for s in every if self.part_of(int(s.group.split()[1]), self.fold) == part]
