# SPDX-License-Identifier: Apache-2.0
"""What claims show: a line for each in a table, and a page with every check, its effect, its interval and its power."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import formatting
from .page import Details, Headline, Page, Section, Text, made
from .table import Cell, Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from rich.console import Console

    from ..experiment.claim import ClaimRun

__all__ = ["Shown", "checks", "line_table", "page", "print_run"]

_FEW = 12  # figures that the terminal shows


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A claim and one run of it.

    Attributes:
        slug, statement: of the claim.
        reported: what the paper says, and where.
        run: what was found; None where it could not be run.
        caveat: what the reader has to know.
        error: why it could not be run.
        known: what the package knows of a claim that was not run here.
    """

    slug: str
    statement: str
    reported: str = ""
    run: ClaimRun | None = None
    caveat: str = ""
    error: str = ""
    known: str = ""

    @property
    def line(self) -> str:
        """What it says in a line."""
        return f"failed: {self.error}" if self.error else self.run.line if self.run else self.known or "not run yet"


def line_table(shown: Sequence[Shown]) -> Table:
    """A row for each claim."""
    rows = [
        [
            one.slug, one.run.tier if one.run else "", one.line.removeprefix(f"{one.run.tier}: " if one.run else ""),
            _ran(one.run) if one.run else "",
            "" if one.run is None or one.run.seconds is None else f"{one.run.seconds:.0f}",
        ]
        for one in shown
    ]  # fmt: skip
    columns = [Column("claim", text=True), Column("tier", text=True), Column("checks", text=True),
               Column("on", text=True), Column("seconds")]  # fmt: skip
    return Table(columns, rows, repeats=True)


def _ran(run: ClaimRun) -> str:
    """On what a run ran: the size is said where it is not that of the device."""
    return run.measured if run.size == run.device else f"{run.measured}, {run.size}"


def checks(run: ClaimRun) -> Table:
    """A row for each check: its word, the effect with its interval, the interval's kind, and what the run could see."""
    rows: list[list[Cell | str]] = []
    for check in run.checks:
        effect = check.effect
        shown = Cell("") if effect is None else Cell(
            formatting.number(effect.value), formatting.interval(effect.low, effect.high)
        )  # fmt: skip
        rows.append([
            Cell(check.check, check.reason), Cell(run.word(check) if check.word else "–"), shown,
            formatting.number(check.bound) if effect is not None else "",
            Cell("", "") if effect is None else Cell(effect.interval, f"n = {effect.n} in {effect.groups}"),
            "" if check.detectable is None else formatting.number(check.detectable),
            "" if check.needed is None else f"{check.needed:,}",
        ])  # fmt: skip
    columns = [
        Column("check", text=True), Column("word", text=True), Column("effect"), Column("against"),
        Column("interval", text=True), Column("detectable"), Column("needed"),
    ]  # fmt: skip
    return Table(columns, rows, repeats=True)


def page(shown: Sequence[Shown], run: Mapping[str, Any]) -> Page:
    """The page of several claims.

    Args:
        shown: the claims, each with a run.
        run: command, environment and date, for the foot of the page.
    """
    words = Counter(one.run.word(check) for one in shown if one.run for check in one.run.checks if check.word)
    said = ", ".join(f"{count} {word}" for word, count in words.most_common())
    heads = [Headline(f"{len(shown)} claims; of the checks of full runs: {said or 'none was made'}.")]
    heads += [Headline(one.line, one.slug) for one in shown if one.error]
    return Page(
        "claims", "Claims of papers, checked here", f"{len(shown)} claims", heads,
        [
            Section("In a line", [line_table(shown)]),
            *(Section(one.slug, _parts(one)) for one in shown),
            made(
                run, [],
                "A word comes from an interval and a margin alone. Detectable is the effect beyond the bound that a "
                "run of this size sees four times of five (of a ratio: the factor); needed are the independent groups "
                "with which such runs would decide. A proxy that contradicts has not shown the claim, no more. Quick "
                "runs give figures and no word.", "made in Python",
            ),
        ],
    )  # fmt: skip


def _parts(one: Shown) -> list[Text | Table | Details]:
    parts: list[Text | Table | Details] = [Text(one.statement, soft=False)] if one.statement else []
    if one.reported:
        parts.append(Text(f"Paper: {one.reported}"))
    if one.caveat:
        parts.append(Text(one.caveat))
    if one.run is None:
        return [*parts, Text(one.line)]
    parts.append(Text(f"{one.line}. {_setting(one.run)}"))
    if one.run.legacy is not None:
        parts.append(Text(one.run.legacy["reason"]))
    parts += [Text(f"Retracted: {entry['check']}: {entry['word']}. {entry['reason']}") for entry in one.run.retracted]
    if one.run.checks:
        parts.append(checks(one.run))
    if one.run.figures:
        parts.append(Details(f"All {len(one.run.figures)} figures", figures(one.run)))
    return parts


def figures(run: ClaimRun) -> Table:
    """A row for each figure: metric, arm, conditions, the estimate and the difference to the baseline."""
    rows = []
    for figure in run.figures:
        at = ", ".join(f"{name} {value}" for name, value in figure["at"].items())
        delta = figure.get("delta")
        rows.append([
            figure["metric"], figure["arm"], at, figure["unit"], _estimate(figure["estimate"]),
            Cell("") if delta is None else _estimate(delta), figure["estimate"]["interval"],
        ])  # fmt: skip
    names = ("metric", "arm", "at", "unit")
    columns = [*(Column(name, text=True) for name in names), Column("value"), Column("difference"),
               Column("interval", text=True)]  # fmt: skip
    return Table(columns, rows, repeats=True)


def _estimate(plain: Mapping[str, Any]) -> Cell:
    low, high = plain["low"], plain["high"]
    range_ = "" if low is None or high is None else formatting.interval(low, high)
    return Cell(formatting.number(plain["value"]), range_)


def _setting(run: ClaimRun) -> str:
    """On what the run ran."""
    machine = run.environment.get("gpu") if run.device == "cuda" else run.environment.get("cpu")
    took = "" if run.seconds is None else f"{run.seconds:.0f} s "
    return f"{run.size} size, {len(run.seeds)} seed(s), {took}on {machine}, {run.date}: {run.command}"


def print_run(one: Shown, console: Console) -> None:
    """Print a claim, its line and its checks."""
    said = {"claim": one.statement, "paper": one.reported, "caveat": one.caveat}
    print_lines([f"{one.slug}: {one.line}", *(f"{name}: {text}" for name, text in said.items() if text)], console)
    if one.run is None:
        return
    if one.run.checks:
        print_table(checks(one.run), console)
    elif one.run.legacy is not None:
        print_lines([one.run.legacy["reason"]], console)
        print_lines([f"  {_plain(figure)}" for figure in one.run.figures[:_FEW]], console)
    print_lines([_setting(one.run)], console)


def _plain(figure: Mapping[str, Any]) -> str:
    cell = _estimate(figure["estimate"])
    return " ".join(filter(None, (figure["metric"], cell.text, figure["unit"], cell.small and f"({cell.small})")))
