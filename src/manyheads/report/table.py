# SPDX-License-Identifier: Apache-2.0
"""Tables: their cells are made once, for the page and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from .. import formatting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

__all__ = [
    "Cell",
    "Column",
    "Estimate",
    "Range",
    "Row",
    "Table",
    "comparison",
    "estimate",
    "print_lines",
    "print_table",
    "ratio",
]


class Estimate(Protocol):
    """A figure and its interval, which may be infinite."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Range:
    """An :class:`Estimate` of plain numbers."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its heading; a line break is one in the terminal.
        unit: of its figures, stands beside the heading.
        higher: whether more is better, None where nothing is.
        share: whether figures are shares, written as percents.
        note: below the heading, on the page only.
        text: of words rather than of figures.
        relative: a figure's difference to the base stands first, the figure itself below.
        digits: behind the point; three significant ones with None.
        page: on the page only.
    """

    name: str
    unit: str = ""
    higher: bool | None = None
    share: bool = False
    note: str = ""
    text: bool = False
    relative: bool = False
    digits: int | None = 3
    page: bool = False


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

    kind: ClassVar[str] = "table"
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


@dataclass(frozen=True)
class Row:
    """What is known of one arm.

    Attributes:
        label: its name.
        budget: in words, empty where it has none.
        values: figures by key of a column.
        deltas: their paired differences to the base; empty for the base itself.
        best: keys of the columns in which it is the best.
        title: its whole spec.
        before, after: further cells beside the figures.
    """

    label: str
    budget: str
    values: Mapping[str, Estimate]
    deltas: Mapping[str, Estimate]
    best: frozenset[str] = frozenset()
    title: str = ""
    before: Sequence[Cell] = ()
    after: Sequence[Cell] = ()


def comparison(
    name: str, columns: Mapping[str, Column], rows: Iterable[Row], *, before: Sequence[Column] = (),
    after: Sequence[Column] = (), title: str = "", note: str = "", equal: str = "",
) -> Table:  # fmt: skip
    """The table of arms: label (under the heading ``name``), budget, cells before, a figure a column, cells after.

    ``equal`` says what is the same in all arms of one budget.
    """
    rows = list(rows)
    budgets = any(row.budget for row in rows)
    made = []
    for row in rows:
        cells: list[Cell | str] = [Cell(row.label, title=row.title), *([row.budget] if budgets else []), *row.before]
        for key, column in columns.items():
            value = row.values.get(key)
            cells.append("" if value is None else estimate(column, value, row.deltas.get(key), key in row.best))
        made.append([*cells, *row.after])
    head = [Column(name, text=True), *([Column("budget", equal)] if budgets else []), *before]
    return Table([*head, *columns.values(), *after], made, title, note)


def estimate(column: Column, value: Estimate, delta: Estimate | None = None, best: bool = False) -> Cell:
    """A figure with its interval; ``*`` where the interval of ``delta`` excludes zero."""

    def text(x: Estimate, signed: bool = False) -> str:
        if column.share:
            return formatting.percent(x.value, signed)
        if column.digits is None:
            return formatting.number(x.value)
        return f"{x.value:{'+' if signed else ''}.{column.digits}f}"

    def range_(x: Estimate) -> str:
        return formatting.interval(x.low, x.high, column.share, column.digits)

    if delta is None:
        return Cell(text(value), range_(value), best=best)
    mark = "*" if delta.low > 0 or delta.high < 0 else ""
    if column.relative:
        return Cell(text(delta, True) + mark, range_(delta), f"{text(value)} ({range_(value)})", best)
    return Cell(text(value) + mark, range_(value), f"{text(delta, True)} ({range_(delta)})", best)


def ratio(text: str, value: float, base: float | None) -> Cell:
    """A cost and how many times that of the base it is; nothing of the kind for the base itself."""
    return Cell(text, "" if base is None else f"×{value / base:.3g}")


def print_table(table: Table, console: Console) -> None:
    """Print a table: figures on the right, intervals below them in grey."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(title=Text(table.title) if table.title else None, box=box.SIMPLE_HEAD, title_justify="left",
                     title_style="bold")  # fmt: skip
    shown = [i for i, column in enumerate(table.columns) if not column.page]
    for i in shown:
        column = table.columns[i]
        heading = column.name + (f"\n{column.unit}" if column.unit else "")
        words = column.text and any(len(row[i].text) > 40 for row in table.cells)
        made.add_column(Text(heading), justify="left" if column.text else "right", no_wrap=not words,
                        ratio=1 if words else None)  # fmt: skip
    for row in table.cells:
        cells = []
        for i in shown:
            text = Text(row[i].text, "bold green" if row[i].best else "")
            cells.append(text.append(f"\n{row[i].small}", "not bold dim") if row[i].small else text)
        made.add_row(*cells)
    console.print(made)


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines as they are: no markup, no breaks."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
