# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: ``run.json`` says what is run, ``units/`` holds a file of rows for every unit that is done.

A unit's file is written whole or not at all, and holds the same rows whoever writes it. So any number of processes may
work in one folder, a killed one loses the unit at hand and nothing else, and a run that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import check_writable, write_atomically
from .rows import Row

__all__ = ["FOLDER", "Journal", "Results", "folder_for", "read_run"]

FOLDER = "manyheads-report"
FORMAT = 2
RUN, UNITS, REPORT = "run.json", "units", "report.html"
# What of a run has to agree for its rows to go on; the rest (the date, the seconds) may differ.
_FIXED = ("experiment", "model", "texts", "versions", "source", "units")


@dataclass(frozen=True)
class Results:
    """A run, finished or not.

    Attributes:
        run: what was asked, on which machine, and what was left out and why, as in ``run.json``.
        rows: what was measured.
        folder: where they are kept.
    """

    run: dict[str, Any]
    rows: list[Row]
    folder: Path

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Read a run's folder.

        Raises:
            UserError: there is no run in it.
        """
        place = Path(folder)
        run = read_run(place)
        done = _done(place)
        return cls(run, [row for unit in run["units"] for row in done.get(unit, ())], place)

    @property
    def finished(self) -> bool:
        """Whether every unit is done."""
        return set(self.run["units"]) <= set(_done(self.folder))

    @property
    def report(self) -> Path:
        """Path of the report page."""
        return self.folder / REPORT


class Journal:
    """The units of a run while it goes on.

    Args:
        folder: made if missing; goes on with the units of an unfinished run of the same experiment.
        run: contents of ``run.json``; ``units`` are the keys of all.

    Raises:
        UserError: the folder cannot be written to, or holds a run of another experiment.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            (folder / UNITS).mkdir(parents=True, exist_ok=True)
            if (folder / RUN).exists():
                _same(read_run(folder), json.loads(_text(run)), folder)
            else:
                write_atomically(folder / RUN, _text(run))
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error}); give another folder with --out") from error
        self.run = read_run(folder)

    def has(self, unit: str) -> bool:
        """Whether the unit is done, by whichever process."""
        return _rows_of(self.folder / UNITS / _name(unit)) is not None

    def add(self, unit: str, rows: Iterable[Row]) -> None:
        """Write the rows of a unit, all or none of which will be found again."""
        lines = [json.dumps(row.plain(), ensure_ascii=False) for row in rows]
        head = json.dumps({"unit": unit, "rows": len(lines)})
        write_atomically(self.folder / UNITS / _name(unit), "".join(f"{line}\n" for line in (head, *lines)))

    def finish(self, **more: Any) -> Results:
        """Note ``more`` in ``run.json`` and return the results."""
        self.run = {**self.run, **more}
        write_atomically(self.folder / RUN, _text(self.run))
        return Results.read(self.folder)


def read_run(folder: Path) -> dict[str, Any]:
    """Contents of the ``run.json`` in ``folder``; UserError when there is none that can be read."""
    try:
        run: Any = json.loads((folder / RUN).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no run: it has no {RUN}; give a folder that `manyheads compare` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RUN} cannot be read ({error}); start again with another --out") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise UserError(f"{folder / RUN} was written by another version of manyheads; start again with another --out")
    found: dict[str, Any] = run
    return found


def folder_for(out: Path | None, options: Mapping[str, Any]) -> tuple[Path, bool]:
    """Where a run of ``options`` goes, and whether it is there already, finished.

    Without ``out``: :data:`FOLDER`, or that with -2, -3, ..., the first that is free or holds an unfinished run of the
    same options, which then goes on.

    Raises:
        UserError: the folder cannot be written to, or ``out`` holds a finished run of other options.
    """
    place, count = Path(FOLDER) if out is None else out, 1
    while (place / RUN).exists():
        found = Results.read(place)
        same = found.run["options"] == options
        if out is not None:
            if found.finished and not same:
                raise UserError(f"{out} holds a finished run of other options; give another --out")
            return place, found.finished
        if same and not found.finished:
            return place, False
        count += 1
        place = Path(f"{FOLDER}-{count}")
    check_writable(place)
    return place, False


def _same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    if different := _differences({k: before.get(k) for k in _FIXED}, {k: now.get(k) for k in _FIXED}):
        raise UserError(
            f"{folder} holds a run of other settings ({', '.join(different[:4])}); "
            "give another --out, or --resume it with no other option"
        )


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        return [d for name in names for d in _differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)]
    return [] if a == b else [path]


def _done(folder: Path) -> dict[str, Sequence[Row]]:
    """Rows by key of the units that are done; a file that another process is writing is not seen."""
    read = (_rows_of(path) for path in sorted((folder / UNITS).glob("[!.]*.jsonl")))
    return dict(found for found in read if found is not None)


def _rows_of(path: Path) -> tuple[str, list[Row]] | None:
    """Key and rows of a unit; None where its file is missing, cut off, or none that :class:`Journal` wrote."""
    try:
        text = path.read_text("utf-8")
        head, *lines = text.split("\n")[:-1] if text.endswith("\n") else [""]
        about = json.loads(head)
        if path.name != _name(about["unit"]) or about["rows"] != len(lines):
            return None
        return about["unit"], [Row(**json.loads(line)) for line in lines]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _name(unit: str) -> str:
    """A file name that tells units apart on any file system."""
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', unit)[:80]}.{hashlib.sha256(unit.encode()).hexdigest()[:10]}.jsonl"


def _text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=2, ensure_ascii=False) + "\n"
