# SPDX-License-Identifier: Apache-2.0
"""How far a long command is: a live bar on stderr, or lines where that is no terminal."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Progress", "shown", "time_left"]

_KNOWN, _SHARE = 3.0, 0.02  # seconds, and share of the work, after which the time left is said


class Progress(Protocol):
    """Hears how far a run is: ``done`` of ``total`` in any unit, and what is going on."""

    def __call__(self, done: float, total: float, message: str) -> None: ...


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """A live display on stderr; one line for each task where that is no terminal; nothing if ``quiet``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console, pace = Console(stderr=True, highlight=False), _Pace(time.monotonic())
    if quiet or not console.is_terminal:
        said: list[str] = []

        def say(done: float, total: float, message: str) -> None:
            left = pace.left(time.monotonic(), done, total)
            if message and not quiet and said[-1:] != [message]:
                said.append(message)
                console.print(f"{done / total:4.0%} {message}{left and f' ({left})'}", markup=False)

        yield say
        return
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as display:
        bar = display.add_task("", total=None, left="")

        def update(done: float, total: float, message: str) -> None:
            left = pace.left(time.monotonic(), done, total)
            display.update(bar, completed=done, total=total, description=message, left=left)

        yield update


class _Pace:
    """How fast the work goes: what was done before the first report, as by a run that goes on, took no time of this."""

    def __init__(self, begun: float) -> None:
        self.begun = begun
        self.first: float | None = None

    def left(self, now: float, done: float, total: float) -> str:
        if self.first is None:
            self.first = done
        rest = total - self.first
        return time_left(now - self.begun, (done - self.first) / rest if rest > 0 else 1.0)


def time_left(passed: float, share: float) -> str:
    """How long it will take after ``passed`` seconds for a ``share`` of the work; empty where nobody can know.

    That is in the first three seconds, and until a fiftieth of the work is done: less says little of the rest.

    time_left(30, 0.25)  # "about 1:30 left"
    """
    if passed < _KNOWN or not _SHARE <= share < 1:
        return ""
    seconds = round(passed * (1 - share) / share)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"about {f'{hours}:{minutes:02}' if hours else minutes}:{seconds % 60:02} left"
