# SPDX-License-Identifier: Apache-2.0
"""Tables: their cells are made once, for the page and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
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

    Labels of the first column that repeat the one above are left out if not ``repeats``.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    repeats: bool = False

    @property
    def cells(self) -> list[list[Cell]]:
        """All cells as they are shown."""
        made = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows]
        for above, row in zip(made[::-1][1:], made[::-1], strict=False):
            if row and not self.repeats and self.columns[0].text and row[0].text == above[0].text:
                row[0] = Cell("", title=row[0].title)
        return made


def print_table(table: Table, console: Console) -> None:
    """Print a table: figures on the right, intervals below them in grey."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(title=Text(table.title) if table.title else None, box=box.SIMPLE_HEAD, title_justify="left",
                     title_style="bold")  # fmt: skip
    rows = table.cells
    for i, column in enumerate(table.columns):
        heading = column.name + (f"\n{column.unit}" if column.unit else "")
        words = column.text and any(len(row[i].text) > 40 for row in rows)
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
