# SPDX-License-Identifier: Apache-2.0
"""Prices of shares: three public sets, two that are made here, and files of one's own.

``year``    12 shares of the United States, one year each (eleven from 2018 to 2019, Google's from 2016 to 2017)
``decade``  8 shares and 2 funds, those of FNSPID in Time-IMM, from 2009 to 2011 on to December 2023
``sectors`` 88 shares of nine sectors, those of StockNet, September 2012 to September 2017; chosen by their size of a
            later year than the first ones, so that shares which fell are missing
``echo``    made here, see :func:`echoes`
``peaks``   made here, see :func:`peaks`
"""

import csv
import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from . import files

__all__ = [
    "COLUMNS",
    "FILES",
    "TAKES",
    "Prices",
    "echoes",
    "peaks",
    "read_prices",
    "read_shares",
    "stock_folder",
    "stocks",
]

COLUMNS = ("open", "high", "low", "close", "adjusted", "volume")
FILES: Mapping[str, tuple[str, ...]] = {  # entries of files.toml, of which one will do
    "year": ("stocks", "stock-prediction-models"),
    "decade": ("time-imm", "time-imm-repository"),
    "sectors": ("stocknet-prices", "stocknet-dataset"),
}
TAKES = "a folder of CSV files, one a share, with the columns date, open, high, low, close and, if known, volume"
_FEWEST = 2  # days of a file
_SEEN = 20  # weeks in which `peaks` has the one of most volume
_MONTH = "GOOG"  # a file of the year's archive that has one month of a share of which there is a year
_DATES = ("date", "date_time", "timestamp", "time")
_ADJUSTED = ("adjusted", "adj close", "adj_close", "adjusted close")
_NAMES = ("ticker", "symbol", "share", "name")


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """One share.

    Attributes:
        name: its ticker.
        dates: ``datetime64[D] [T]``, ascending, each once; trading days, so that weekends are missing.
        values: float64 ``[T, 6]``, the columns of :data:`COLUMNS`. ``adjusted`` is the close made comparable over
            dividends and splits, the close itself where a file has none; the other prices are as they were quoted.
    """

    name: str
    dates: NDArray[Any]
    values: NDArray[np.float64]

    def column(self, name: str) -> NDArray[np.float64]:
        """One of :data:`COLUMNS`, ``[T]``."""
        found: NDArray[np.float64] = self.values[:, COLUMNS.index(name)]
        return found

    def log_returns(self) -> NDArray[np.float64]:
        """``log(adjusted_t / adjusted_{t-1})``, ``[T - 1]``: what is known at the close of ``dates[1:]``."""
        found: NDArray[np.float64] = np.diff(np.log(self.column("adjusted")))
        return found


@cache
def stocks(source: str = "year") -> tuple[Prices, ...]:
    """Shares of a set, by name.

    Raises:
        UserError: there is no such set, or its file cannot be had.
    """
    if source in _MADE:
        return _MADE[source]()
    if source not in FILES:
        raise UserError(f"there are no prices {source!r}; there are {', '.join((*FILES, *_MADE))}")
    packed, published = FILES[source]
    found = []
    with zipfile.ZipFile(files.local(packed) or files.path(published)) as archive:
        for member in archive.namelist():
            place = Path(member)
            if source == "decade":
                wanted, name = "FNSPID/processed/" in member and place.name == "time_series.csv", place.parent.name
            elif source == "sectors":
                wanted, name = "/price/raw/" in member and place.suffix == ".csv", place.stem
            else:  # the archive has rates of exchange too
                wanted, name = place.parent.name == "dataset" and place.stem != _MONTH, place.stem
            if not wanted:
                continue
            rows = csv.DictReader(io.StringIO(archive.read(member).decode("utf-8-sig")))
            if not {"open", "close", "volume"} <= {(column or "").lower() for column in rows.fieldnames or ()}:
                continue
            found.append(_prices(name.removesuffix("-year"), rows, member))
    return tuple(sorted(found, key=lambda one: one.name))


def read_prices(path: str | Path) -> Prices:
    """A share of one's own: a CSV file with a line of headings, in any order of days.

    Raises:
        UserError: the file cannot be read, lacks a column, or holds what is no price.
    """
    place = Path(path)
    return _prices(place.stem, _rows(place), str(place))


def read_shares(path: str | Path) -> tuple[Prices, ...]:
    """Shares of one's own, by name: a folder as :func:`stock_folder` reads it, or a CSV file of several.

    Each row of the file names its share, in a column called ticker, symbol, share or name.

    Raises:
        UserError: as :func:`read_prices` does, or there is no such column.
    """
    place = Path(path)
    if place.is_dir():
        return stock_folder(place)
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(place):
        cells = {(key or "").strip().lower(): value for key, value in row.items()}
        if (name := next((cells[key] for key in _NAMES if cells.get(key)), None)) is None:
            raise UserError(f"{place} names no share in a column {' or '.join(_NAMES)}; give such a file, or {TAKES}")
        parts.setdefault(name.strip(), []).append(row)
    return tuple(_prices(name, parts[name], f"{place}, {name}") for name in sorted(parts))


def _rows(place: Path) -> Iterable[Mapping[str, Any]]:
    try:
        return csv.DictReader(io.StringIO(place.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place} cannot be read as a CSV file of prices ({error})") from error


def stock_folder(folder: Path) -> tuple[Prices, ...]:
    """Shares of a folder, one a file, by name; raises as :func:`read_prices` does, or where there is no file."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise UserError(f"{folder} holds no file that can be used; it should be {TAKES}")
    return tuple(read_prices(path) for path in paths)


def _prices(name: str, rows: Iterable[Mapping[str, Any]], where: str) -> Prices:
    """Rows of any order as a share; days without a close are left out, of a day that is there twice the last counts."""
    found: dict[np.datetime64, list[float]] = {}
    for number, row in enumerate(rows, 2):
        cells = {(key or "").strip().lower(): "" if value == "null" else value for key, value in row.items()}
        date = next((cells[key] for key in _DATES if key in cells), None)
        if date is None or "close" not in cells:
            raise UserError(
                f"{where} has no column date or none called close; it should have {TAKES.partition('with ')[2]}"
            )
        try:
            close = float(cells["close"] or "nan")
            prices = [float(cells.get(key) or close) for key in ("open", "high", "low")]
            adjusted = next((float(cells[key]) for key in _ADJUSTED if cells.get(key)), close)
            volume = float(cells.get("volume") or 0)
            day = np.datetime64(date.strip()[:10], "D")
        except ValueError as error:
            raise UserError(f"{where}, line {number}: {error}; dates are written 2024-01-31, prices as 12.5") from error
        if np.isfinite([close, adjusted, *prices]).all():
            found[day] = [*prices, close, adjusted, volume]
    values = np.array([found[day] for day in sorted(found)])
    if len(found) < _FEWEST or (values[:, :5] <= 0).any():
        raise UserError(f"{where} has {len(found)} days; give {_FEWEST} or more, with prices above 0")
    return Prices(name, np.array(sorted(found), dtype="datetime64[D]"), values)


def echoes(lag: int = 25, days: int = 420) -> tuple[Prices, ...]:
    """Twelve made shares whose returns are 0.8 times those of 25 days before, and chance."""
    found = []
    for number in range(12):
        rng = np.random.default_rng([number, 41])
        returns = rng.standard_normal(days)
        for t in range(lag, days):
            returns[t] = 0.8 * returns[t - lag] + 0.6 * returns[t]
        close = 100 * np.exp(np.cumsum(returns) / 100)
        spread = np.exp(rng.uniform(0.002, 0.02, days))
        values = np.stack((close, close * spread, close / spread, close, close, rng.uniform(1e5, 2e5, days)), 1)
        dates = np.arange(np.datetime64("2024-01-01"), np.datetime64("2024-01-01") + days)
        found.append(Prices(f"echo {number:02}", dates, values))
    return tuple(found)


def peaks(shares: int = 60, weeks: int = 300) -> tuple[Prices, ...]:
    """Made shares, a day a week, whose return is 0.5 or -0.5 times that of the week of most volume among the last 20.

    It has the same sign after a week of less than the usual volume, the other sign after one of more, so that returns
    alone say nothing of the next one. Volumes tell which week it is; the order of weeks says nothing, which suits a
    model without positions. The rest is chance, and a move that all shares have in common.
    """
    rng = np.random.default_rng([60, 2404])
    volume, own = np.exp(0.6 * rng.standard_normal((weeks, shares))), rng.standard_normal((weeks, shares))
    for t in range(_SEEN, weeks):
        most = volume[t - _SEEN : t].argmax(0) + t - _SEEN
        sign = np.where(volume[t - 1] < 1, 0.5, -0.5)
        own[t] = sign * own[most, np.arange(shares)] + 0.75**0.5 * own[t]
    close = 100 * np.exp(np.cumsum(0.03 * own + 0.02 * rng.standard_normal((weeks, 1)), 0))
    dates = np.datetime64("2018-01-05") + 7 * np.arange(weeks)
    return tuple(
        Prices(f"peak {s:02}", dates, np.stack((*[close[:, s]] * 5, 1e6 * volume[:, s]), 1)) for s in range(shares)
    )


_MADE = {"echo": echoes, "peaks": peaks}
