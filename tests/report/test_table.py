# SPDX-License-Identifier: Apache-2.0
"""Cells, tables and numbers: what page and terminal say, from plain arguments."""

import io

import pytest
from rich.console import Console

from manyheads import formatting
from manyheads.report.table import Cell, Column, Range, Row, Table, comparison, estimate, print_table, ratio

COLUMNS = {
    "loss": Column("loss", "nats", higher=False, relative=True), "right": Column("right", higher=True, share=True)
}  # fmt: skip
ROWS = [
    Row("full", "100 %", {"loss": Range(2, 1.9, 2.1), "right": Range(0.5, 0.4, 0.6)}, {}),
    Row("a", "50 %", {"loss": Range(2.2, 2.1, 2.3), "right": Range(0.4, 0.3, 0.5)},
        {"loss": Range(0.2, 0.1, 0.3), "right": Range(-0.1, -0.2, 0.05)}, frozenset({"loss"}), "a:x=1"),
    Row("a", "20 %", {"right": Range(0.1, 0, 0.2)}, {"right": Range(-0.4, -0.5, -0.3)}),
]  # fmt: skip


def test_cells_follow_the_figures():
    made = comparison("strategy", COLUMNS, ROWS).cells
    assert [cell.text for cell in made[0]] == ["full", "100 %", "2.000", "50 %"]
    assert made[1][0] == Cell("a", title="a:x=1") and made[2][0].text == "" and made[2][2].text == ""
    assert made[1][2] == Cell("+0.200*", "0.100 to 0.300", "2.200 (2.100 to 2.300)", best=True)
    assert made[1][3] == Cell("40 %", "30 to 50", "-10 % (-20 to 5)")
    assert made[2][3].text == "10 %*" and not made[2][3].best
    assert ratio("3", 3, 2) == Cell("3", "×1.5") and ratio("3", 3, None) == Cell("3")


@pytest.mark.parametrize(("low", "high", "marked"), [(0.1, 1, True), (-1, -0.1, True), (-1, 1, False), (0, 1, False)])
def test_a_difference_is_marked_where_its_interval_excludes_zero(low, high, marked):
    column = Column("x")
    assert estimate(column, Range(1, 0, 2), Range(0.5, low, high)).text.endswith("*") == marked


def test_no_interval_is_said():
    made = estimate(Column("x"), Range(1, -float("inf"), float("inf")))
    assert made == Cell("1.000", "no interval")


def test_the_terminal_says_what_the_page_says():
    out = io.StringIO()
    table = comparison("[bold]strategy", COLUMNS | {"more": Column("more", page=True)}, ROWS)
    print_table(table, Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert "[bold]strategy" in out.getvalue() and "more" not in out.getvalue()
    (at,) = [i for i, line in enumerate(lines) if "+0.200*" in line]
    assert "40 %" in lines[at] and "0.100 to 0.300" in lines[at + 1] and "2.200" not in out.getvalue()
    assert lines[at].index("+0.200*") + 7 == lines[at + 1].index("0.100 to 0.300") + 14  # on the right


def test_labels_repeat_only_where_they_should():
    columns = [Column("a", text=True), Column("b")]
    rows = [["x", "1"], ["x", "2"], ["x", "3"]]
    assert [row[0].text for row in Table(columns, rows).cells] == ["x", "", ""]
    assert [row[0].text for row in Table(columns, rows, repeats=True).cells] == ["x"] * 3


def test_numbers_and_sizes():
    assert [formatting.size(n) for n in (12, 1500, 20_971_520, 3e9)] == ["12 B", "1.5 kB", "21.0 MB", "3.00 GB"]
    assert [formatting.length(n) for n in (512, 1536, 16384)] == ["512", "1.5k", "16k"]
    assert [formatting.budget(b) for b in (0.25, 64, 0.125)] == ["25 %", "64 slots", "12.5 %"]
    assert formatting.percent(0.254, signed=True) == "+25 %" and formatting.interval(1e-5, 2, digits=None) == (
        "1.0e-5 to 2"
    )
