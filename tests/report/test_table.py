# SPDX-License-Identifier: Apache-2.0
"""Cells, tables and numbers: what page and terminal say, from plain arguments."""

import io

from rich.console import Console

from manyheads import formatting
from manyheads.report.table import Cell, Column, Table, print_table


def test_the_terminal_says_what_the_page_says():
    columns = [Column("[bold]strategy", text=True), Column("loss", "nats")]
    rows = [["full", Cell("2.00")], ["a", Cell("+0.200*", "0.100 to 0.300", "2.200 (2.100 to 2.300)", best=True)]]
    out = io.StringIO()
    print_table(Table(columns, rows), Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert "[bold]strategy" in out.getvalue() and any("nats" in line for line in lines)
    (at,) = [i for i, line in enumerate(lines) if "+0.200*" in line]
    assert "0.100 to 0.300" in lines[at + 1] and "2.200" not in out.getvalue()
    assert lines[at].index("+0.200*") + 7 == lines[at + 1].index("0.100 to 0.300") + 14  # on the right


def test_labels_repeat_only_where_they_should():
    columns = [Column("a", text=True), Column("b")]
    rows = [["x", "1"], ["x", "2"], ["x", "3"]]
    assert [row[0].text for row in Table(columns, rows).cells] == ["x", "", ""]
    assert [row[0].text for row in Table(columns, rows, repeats=True).cells] == ["x"] * 3


def test_numbers_and_sizes():
    assert [formatting.size(n) for n in (12, 1500, 20_971_520, 3e9)] == ["12 B", "1.5 kB", "21.0 MB", "3.00 GB"]
    assert [formatting.budget(b) for b in (0.25, 64, 0.125)] == ["25 %", "64 slots", "12.5 %"]
    assert formatting.percent(0.254, signed=True) == "+25 %" and formatting.interval(1e-5, 2) == "1.0e-5 to 2"
    assert formatting.interval(0.2, 0.3, True) == "20 to 30" and formatting.interval(1, float("inf")) == "no interval"


def test_a_table_that_is_too_wide_becomes_several(capsys):
    """Every figure is printed whole, each piece with its labels; where there is room it stays one table."""
    columns = [Column("strategy", text=True), Column("budget"), *(Column(f"figure {i}") for i in range(12))]
    rows = [[name, "25 %", *(Cell(f"{i}.123456 of {name}", f"-0.1 to {i}") for i in range(12))] for name in ("a", "bb")]
    for width, pieces in ((400, 1), (100, 3)):
        print_table(Table(columns, rows, "title", labels=2), Console(width=width))
        said = capsys.readouterr().out
        assert said.count("strategy") == said.count("budget") == pieces and "…" not in said
        assert all(f"{i}.123456 of {name}" in said for i in range(12) for name in ("a", "bb"))
        assert said.count("title") == 1 and max(map(len, said.splitlines())) <= width
