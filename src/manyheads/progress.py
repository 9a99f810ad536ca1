# SPDX-License-Identifier: Apache-2.0
"""How far a long command is: a live bar on stderr, or lines where that is no terminal."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Progress", "shown", "time_left"]

_KNOWN = 2.0  # seconds after which the time left is said


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

    console, begun = Console(stderr=True, highlight=False), time.monotonic()
    if quiet or not console.is_terminal:
        said: list[str] = []

        def say(done: float, total: float, message: str) -> None:
            if message and not quiet and said[-1:] != [message]:
                said.append(message)
                left = time_left(time.monotonic() - begun, done / total)
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
            left = time_left(time.monotonic() - begun, done / total)
            display.update(bar, completed=done, total=total, description=message, left=left)

        yield update


def time_left(passed: float, share: float) -> str:
    """How long it will take after ``passed`` seconds for a ``share`` of the work; empty where nobody can know.

    time_left(30, 0.25)  # "about 1:30 left"
    """
    if passed < _KNOWN or not 0 < share < 1:
        return ""
    seconds = round(passed * (1 - share) / share)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"about {f'{hours}:{minutes:02}' if hours else minutes}:{seconds % 60:02} left"
