# SPDX-License-Identifier: Apache-2.0
"""How far a long command is: a live bar on stderr, or lines where that is no terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Progress", "shown"]


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
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal:
        said: list[str] = []

        def say(done: float, total: float, message: str) -> None:
            if message and not quiet and said[-1:] != [message]:
                said.append(message)
                console.print(f"{done / total:4.0%} {message}", markup=False)

        yield say
        return
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as display:
        bar = display.add_task("", total=None)
        yield lambda done, total, message: display.update(bar, completed=done, total=total, description=message)
