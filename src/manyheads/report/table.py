# SPDX-License-Identifier: Apache-2.0
"""Tables: their cells are made once, for the page and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

__all__ = ["Cell", "Column", "Table", "print_lines", "print_table"]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its heading; a line break is one in the terminal.
        unit: of its figures, stands beside the heading.
        note: below the heading, on the page only.
        text: of words rather than of figures.
    """

    name: str
    unit: str = ""
    note: str = ""
    text: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: ``text``, below it in small grey ``small``, and on the page ``more``; ``title`` is told on pointing."""

    text: str
    small: str = ""
    more: str = ""
    best: bool = False
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table of columns and rows; a string stands for a cell.

    Labels of the first column that repeat the one above are left out if not ``repeats``. A terminal that is too narrow
    gets several tables, each with the first ``labels`` columns.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    repeats: bool = False
    labels: int = 1

    @property
    def cells(self) -> list[list[Cell]]:
        """All cells as they are shown."""
        made = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows]
        for above, row in zip(made[::-1][1:], made[::-1], strict=False):
            if row and not self.repeats and self.columns[0].text and row[0].text == above[0].text:
                row[0] = Cell("", title=row[0].title)
        return made


def _wide(column: Column, cells: Sequence[Cell]) -> int:
    """Characters that a column takes, with the space around it."""
    lines = [*column.name.splitlines(), column.unit, *(text for cell in cells for text in (cell.text, cell.small))]
    return 3 + max(map(len, lines))


def _fitting(table: Table, width: int) -> list[Table]:
    """The table, or pieces of its columns that fit into ``width`` characters; one with sentences breaks its lines."""
    by_column = list(zip(*table.cells, strict=True)) or [()] * len(table.columns)
    wide = [_wide(column, cells) for column, cells in zip(table.columns, by_column, strict=True)]
    if sum(wide) <= width or any(_sentences(c, cells) for c, cells in zip(table.columns, by_column, strict=True)):
        return [table]
    labels = list(range(table.labels))
    room = width - sum(wide[i] for i in labels)
    pieces: list[list[int]] = [[]]
    for i in range(table.labels, len(table.columns)):
        if pieces[-1] and sum(wide[j] for j in pieces[-1]) + wide[i] > room:
            pieces.append([])
        pieces[-1].append(i)
    return [
        replace(
            table, columns=[table.columns[i] for i in (*labels, *piece)],
            rows=[[row[i] for i in (*labels, *piece)] for row in table.rows], title=table.title if not n else "",
        )
        for n, piece in enumerate(pieces)
    ]  # fmt: skip


def _sentences(column: Column, cells: Sequence[Cell]) -> bool:
    return column.text and any(len(cell.text) > 40 for cell in cells)


def print_table(table: Table, console: Console) -> None:
    """Print a table: figures on the right, intervals below them in grey."""
    for part in _fitting(table, console.width):
        _print_table(part, console)


def _print_table(table: Table, console: Console) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(title=Text(table.title) if table.title else None, box=box.SIMPLE_HEAD, title_justify="left",
                     title_style="bold")  # fmt: skip
    rows = table.cells
    for i, column in enumerate(table.columns):
        heading = column.name + (f"\n{column.unit}" if column.unit else "")
        words = _sentences(column, [row[i] for row in rows])
        made.add_column(Text(heading), justify="left" if column.text else "right", no_wrap=not words,
                        ratio=1 if words else None)  # fmt: skip
    for row in rows:
        cells = []
        for cell in row:
            text = Text(cell.text, "bold green" if cell.best else "")
            cells.append(text.append(f"\n{cell.small}", "not bold dim") if cell.small else text)
        made.add_row(*cells)
    console.print(made)


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines as they are: no markup, no breaks."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
