# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that forecast: parts by time, a table for forecasters that are no networks, and pictures."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...recipe import Part, Sample
from .._field import FieldTask

__all__ = ["SHARES", "ForecastTask", "Table", "cut_times"]

Array = NDArray[np.float64]
SHARES = (0.6, 0.8)  # of the time, where training ends, and where validation does


def cut_times(times: Array) -> dict[Part, tuple[float, float]]:
    """First time and end of each part, the same for all entities: training, then validation, then the test.

    Args:
        times: of all observations of all entities; the parts have shares of these by :data:`SHARES`.
    """
    first, second = np.quantile(times, SHARES)
    return {
        "train": (-np.inf, float(first)), "validation": (float(first), float(second)), "test": (float(second), np.inf),
    }  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Forecasts as rows, one for each number that is forecast, for models that read a row by itself.

    Attributes:
        names: of the columns; ``last`` and ``season`` are forecasts themselves: the last value, the one of a season
            before.
        features: what is known when the forecast is made, ``[n, columns]``.
        kinds: which variable a row is of, int64 ``[n]``: each has a model of its own.
        targets: what is right ``[n]``, NaN where it is not known.
    """

    names: tuple[str, ...]
    features: Array
    kinds: NDArray[np.int64]
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

    @abstractmethod
    def told(self, sample: Sample, values: Array) -> Any:
        """The prediction that the numbers ``[n]`` of a sample's table make."""
