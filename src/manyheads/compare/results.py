# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: ``run.json`` says what is run, ``rows.jsonl`` grows by a unit at a time, and can be cut off.

A unit's rows are appended in one write and forced to disk; its last row says ``"end": true``. What a killed run left
of an unfinished unit is dropped when the folder is opened again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_atomically

__all__ = ["FOLDER", "Journal", "Results", "Row", "folder_for", "read_run"]

Row = dict[str, Any]

FOLDER = "manyheads-report"
RUN, ROWS, REPORT = "run.json", "rows.jsonl", "report.html"
# What of a run has to agree for its rows to go on; the rest (the date, the seconds) may differ.
_FIXED = ("settings", "model", "texts", "versions")


@dataclass(frozen=True)
class Results:
    """A run, finished or not: what was asked (``run.json``) and what was measured.

    Attributes:
        run: settings, environment, arms, skipped tasks and the like, as in ``run.json``.
        rows: one dict for each arm, context and figure.
        folder: where they are kept.
    """

    run: dict[str, Any]
    rows: list[Row]
    folder: Path

    @classmethod
    def read(cls, folder: str | Path) -> "Results":
        """Read a run's folder.

        Raises:
            UserError: there is no run in it.
        """
        place = Path(folder)
        return cls(read_run(place), _complete(_lines(place / ROWS)), place)

    @property
    def finished(self) -> bool:
        return set(self.run["units"]) <= {row["unit"] for row in self.rows}

    @property
    def report(self) -> Path:
        """Path of the report page."""
        return self.folder / REPORT


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
    if not isinstance(run, dict) or run.get("format") != 1:
        raise UserError(f"{folder / RUN} was written by another version of manyheads; start again with another --out")
    found: dict[str, Any] = run
    return found


def folder_for(out: Path | None, options: dict[str, Any]) -> tuple[Path, bool]:
    """Where a run of ``options`` goes, and whether it is there already, finished.

    Without ``out``: ``manyheads-report``, or the first of ``manyheads-report-2``, ... that is free or holds an
    unfinished run of the same options, which then goes on.

    Raises:
        UserError: the folder cannot be written to, or ``out`` holds a finished run of other options.
    """
    place, number = Path(FOLDER) if out is None else out, 1
    while (place / RUN).exists():
        found = Results.read(place)
        same = found.run["options"] == options
        if out is not None:
            if found.finished and not same:
                raise UserError(f"{out} holds a finished run of other options; give another --out")
            return place, found.finished
        if same and not found.finished:
            return place, False
        number += 1
        place = Path(f"{FOLDER}-{number}")
    parent = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {place}; give another folder with --out")
    return place, False


class Journal:
    """Rows of a run while it goes on.

    Args:
        folder: made if missing; goes on with the rows of an unfinished run of the same settings.
        run: contents of ``run.json``.

    Raises:
        UserError: the folder cannot be written to, or holds a run of other settings.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / RUN).exists():
                self._go_on(run)
            else:
                write_atomically(folder / ROWS, "")
                write_atomically(folder / RUN, _text(run))
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error}); give another folder with --out") from error
        self.run = read_run(folder)
        self.done = {row["unit"] for row in self.rows}

    def _go_on(self, run: dict[str, Any]) -> None:
        before = read_run(self.folder)
        now = json.loads(_text(run))
        if different := _differences({k: before.get(k) for k in _FIXED}, {k: now[k] for k in _FIXED}):
            raise UserError(
                f"{self.folder} holds a run of other settings ({', '.join(different[:4])}); "
                "give another --out, or --resume it with no other option"
            )
        self.rows = _complete(_lines(self.folder / ROWS))
        write_atomically(self.folder / ROWS, "".join(map(_line, self.rows)))

    def add(self, rows: Sequence[Row]) -> None:
        """Append the rows of one unit, all or none of which will be found again."""
        kept = [*rows[:-1], rows[-1] | {"end": True}]
        with (self.folder / ROWS).open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(map(_line, kept)))
            file.flush()
            os.fsync(file.fileno())
        self.rows += kept
        self.done.add(rows[0]["unit"])

    def finish(self, **more: Any) -> Results:
        """Note ``more`` in ``run.json`` and return the results."""
        self.run |= more
        write_atomically(self.folder / RUN, _text(self.run))
        return Results(self.run, self.rows, self.folder)


def _text(run: dict[str, Any]) -> str:
    return json.dumps(run, indent=2, ensure_ascii=False) + "\n"


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[Row]:
    """Rows up to the first line that is none: what was cut off stands last."""
    rows: list[Row] = []
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not {"unit", "task", "metric", "arm", "value"} <= row.keys():
            break
        rows.append(row)
    return rows


def _complete(rows: list[Row]) -> list[Row]:
    ended = {row["unit"] for row in rows if row.get("end")}
    return [row for row in rows if row["unit"] in ended]


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        return [d for name in names for d in _differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)]
    return [] if a == b else [path]
