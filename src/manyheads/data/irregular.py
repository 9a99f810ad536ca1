# SPDX-License-Identifier: Apache-2.0
"""Irregular series of several variables with timestamped texts: Time-IMM, a made one, and folders of one's own.

Each set of Time-IMM has its own kind of irregularity:

``ILINet``        visits for influenza, weekly, 1997 to 2009; values that are missing
``EPA-Air``       air and temperature of eight counties, 2024; sources that are not in step
``CESNET``        traffic of eleven devices, 2024; sampling that comes early or late
``ClusterTrace``  load of three machines; logged as resources allow
``FNSPID``        prices of eight shares and two funds; trading hours
``StudentLife``   activity, places and sleep of twenty students, 2017 to 2022; what people and their phones report
``announced``     made here: shifts of the level that a text foretells five days before; what fusion must be able to use
"""

import csv
import datetime
import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from . import files

__all__ = ["FILES", "SETS", "TAKES", "Record", "Span", "irregular", "read_record", "record_folder"]

FILES = ("time-imm", "time-imm-repository")
TAKES = "a folder of ENTITY/time_series.csv with a column date_time and one of each variable, beside it text.csv"
_TIMES = ("date_time", "date", "time", "timestamp")
_FORMATS = ("%m/%d/%Y", "%d.%m.%Y")  # beside ISO's
_UNIX = datetime.datetime(1970, 1, 1)
_FEWEST = 8  # rows of a record


@dataclass(frozen=True, slots=True)
class Span:
    """How a set is cut.

    Attributes:
        days: of the history of a forecast, and of its horizon.
        steps: observations that there are in so long, about.
        stride: days between two forecasts that are judged; those of the horizon when 0.
    """

    days: float
    steps: int
    stride: float = 0.0


SETS: Mapping[str, Span] = {  # days as the authors have them
    "ILINet": Span(36 * 7.0, 36, 4 * 7.0), "EPA-Air": Span(7.0, 168), "CESNET": Span(7.0, 148),
    "ClusterTrace": Span(0.5, 40), "FNSPID": Span(31.0, 22), "StudentLife": Span(31.0, 31),
    "announced": Span(10.0, 16),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What is known of one entity over a stretch of time.

    Attributes:
        name: of the entity.
        variables: names of the C variables.
        times: days since 1970, float64 ``[L]``, ascending, each once.
        values: float64 ``[L, C]``, NaN where nothing was observed.
        note_times: days since 1970 of the texts, ascending ``[N]``.
        notes: texts.
        scale: mean and deviation of each variable, ``[2, C]``, of what models are trained on.
    """

    name: str
    variables: tuple[str, ...]
    times: NDArray[np.float64]
    values: NDArray[np.float64]
    note_times: NDArray[np.float64]
    notes: tuple[str, ...]
    scale: NDArray[np.float64]

    def __neg__(self) -> "Record":
        """The record with every value negated."""
        return replace(self, values=-self.values)

    def between(self, first: float, last: float) -> "Record":
        """What is known from ``first`` on, up to ``last``, which is no part of it."""
        rows = (self.times >= first) & (self.times < last)
        texts = (self.note_times >= first) & (self.note_times < last)
        return replace(
            self, times=self.times[rows], values=self.values[rows], note_times=self.note_times[texts],
            notes=tuple(note for note, there in zip(self.notes, texts, strict=True) if there),
        )  # fmt: skip


@cache
def irregular(name: str) -> tuple[Record, ...]:
    """The records of a set, by name.

    Raises:
        UserError: there is no such set, or its file cannot be had.
    """
    if name not in SETS:
        raise UserError(f"there are no irregular series {name!r}; there are {', '.join(SETS)}")
    if name == "announced":
        return tuple(_announced(i) for i in range(12))
    texts: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(files.local(FILES[0]) or files.path(FILES[1])) as archive:
        for member in archive.namelist():
            place = Path(member)
            if f"{name}/processed/" in member and place.suffix == ".csv":
                texts.setdefault(place.parent.name, {})[place.stem] = archive.read(member).decode("utf-8-sig")
    return tuple(
        _record(entity, own["time_series"], own.get("text", ""), entity) for entity, own in sorted(texts.items())
    )


def read_record(path: str | Path) -> Record:
    """A CSV file of one's own, and the texts of ``text.csv`` beside it, if there are any.

    Raises:
        UserError: the file cannot be read, or what it holds is no series.
    """
    place = Path(path)
    beside = place.with_name("text.csv")
    try:
        series = place.read_text(encoding="utf-8-sig")
        texts = beside.read_text(encoding="utf-8-sig") if beside.is_file() and beside != place else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place} cannot be read as a CSV file of a series ({error})") from error
    return _record(place.parent.name if place.stem == "time_series" else place.stem, series, texts, str(place))


def record_folder(folder: Path) -> tuple[Record, ...]:
    """Records of a folder of one's own, all of the same variables; raises as :func:`read_record` does."""
    paths = sorted(folder.glob("*/time_series.csv")) or sorted(
        path for path in folder.glob("*.csv") if path.stem != "text"
    )
    if not paths:
        raise UserError(f"{folder} holds no series that can be used; it should be {TAKES}")
    found = tuple(read_record(path) for path in paths)
    if odd := next((one for one in found if one.variables != found[0].variables), None):
        raise UserError(
            f"{odd.name} has the variables {', '.join(odd.variables)} and {found[0].name} has "
            f"{', '.join(found[0].variables)}; all entities of a folder have the same"
        )
    return found


def _record(name: str, series: str, texts: str, where: str) -> Record:
    rows = list(csv.DictReader(io.StringIO(series)))
    key = next((known for known in _TIMES if rows and known in rows[0]), None)
    if key is None or len(rows) < _FEWEST:
        raise UserError(
            f"{where} has no column date_time, or fewer than {_FEWEST} rows; give {TAKES.partition(' of ')[2]}"
        )
    variables = tuple(column for column in rows[0] if column and column not in (key, "record_id"))
    found: dict[float, list[float]] = {}
    for number, row in enumerate(rows, 2):
        try:
            values = [float(row[one] or "nan") for one in variables]
            time = _days(row[key])
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{where}, line {number}: {error}; times are written 2024-01-31 18:00, values 12.5"
            ) from error
        before = found.get(time, values)  # a time that is there twice: what is known later counts
        found[time] = [new if new == new else old for new, old in zip(values, before, strict=True)]
    times = np.array(sorted(found))
    notes = sorted(_notes(texts, where))
    return Record(
        name, variables, times, np.array([found[time] for time in times]),
        np.array([time for time, _ in notes], np.float64), tuple(note for _, note in notes),
        np.array([[0.0], [1.0]]).repeat(len(variables), 1),
    )  # fmt: skip


def _notes(texts: str, where: str) -> Iterable[tuple[float, str]]:
    for number, row in enumerate(csv.DictReader(io.StringIO(texts)), 2):
        key = next((known for known in _TIMES if known in row), None)
        said = [value for column, value in row.items() if column not in (key, "record_id") and value]
        if key is None:
            raise UserError(f"the texts of {where} have no column date_time")
        try:
            time = _days(row[key])
        except ValueError as error:
            raise UserError(f"the texts of {where}, line {number}: {error}") from error
        if said and said[-1].strip():
            yield time, said[-1].strip()


def _days(text: str) -> float:
    """Days since 1970 of a date or a date with a time of day."""
    try:
        found = datetime.datetime.fromisoformat(text.strip())
    except ValueError as error:
        for known in _FORMATS:
            try:
                found = datetime.datetime.strptime(text.strip(), known)
                break
            except ValueError:
                continue
        else:
            raise error
    return (found.replace(tzinfo=None) - _UNIX) / datetime.timedelta(days=1)


_SAYINGS: Sequence[tuple[float, str]] = (
    (1, "Orders have been placed, and the load is expected to rise sharply in five days."),
    (1, "In five days a new customer joins us; demand will be much higher from then on."),
    (1, "We expect a clear increase of the level five days from today."),
    (-1, "Maintenance is planned: the load will drop sharply in five days."),
    (-1, "A customer leaves us in five days; demand will be much lower from then on."),
    (-1, "We expect a clear decrease of the level five days from today."),
    (0, "Nothing unusual is planned for the days to come."),
    (0, "The routine inspection found everything in order."),
)  # fmt: skip


def _announced(number: int, days: int = 400) -> Record:
    """Two variables, observed 1.6 times a day at random, one of both missing at times; shifts of 1.5 deviations."""
    rng = np.random.default_rng([number, 11])
    times = np.sort(rng.uniform(0, days, int(1.6 * days)))
    level, notes = np.zeros(len(times)), list[tuple[float, str]]()
    at = float(rng.uniform(2, 12))
    while at < days - 5:
        kind, text = _SAYINGS[int(rng.integers(len(_SAYINGS)))]
        notes.append((at, text))
        level += 1.5 * kind * (times >= at + 5)
        at += float(rng.uniform(4, 12))
    values = level[:, None] * np.array([1.0, -0.6]) + rng.standard_normal((len(times), 2)) * 0.5
    values[rng.random(values.shape) < 0.3] = np.nan
    start = (datetime.datetime(2024, 1, 1) - _UNIX).days
    scale: NDArray[Any] = np.array([[0.0, 0.0], [1.0, 1.0]])
    return Record(
        f"site {number:02}", ("load", "spare"), start + times, values, np.array([start + t for t, _ in notes]),
        tuple(text for _, text in notes), scale,
    )  # fmt: skip
