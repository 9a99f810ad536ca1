# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads parallel`` shows: each method on each mask, as measured or as modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import formatting
from .page import Headline, Notes, Page, Section, made
from .table import Cell, Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ..experiment import Results

__all__ = ["document", "modelled_page", "page", "print_modelled", "print_results"]

_CARE = (
    "Bytes are counted at the calls that send, and are those of all processes together. Needed: what shares heads, and "
    "keys that a row sees; a formula for the same bytes agrees to the byte where = stands.",
    "Balance is the work of the busiest process over the mean, by the mask's true area. TFLOP/s are of one process, by "
    "the true area and the slowest process.",
    "Modelled times are not measured: an alpha-beta model of the cluster named, and an efficiency of attention that is "
    "assumed unless a measured curve was given.",
)  # fmt: skip


def rows_of(results: Results) -> list[dict[str, Any]]:
    """A row for each mask and method: means over draws, medians over rounds; or why there is none."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    about: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results.rows:
        key = str(row.at["mask"]), row.arm
        if row.metric == "ran":
            about[key] = dict(row.about)
        else:
            values.setdefault(key, {}).setdefault(row.metric, []).append(row.value)
    timed = {"slowest", "mean", "rate"}
    return [
        {"mask": key[0], "method": key[1], **said}
        | {name: median(x) if name in timed else sum(x) / len(x) for name, x in values.get(key, {}).items()}
        for key, said in about.items()
    ]


def document(results: Results) -> dict[str, Any]:
    """The run as JSON has it."""
    run = results.run
    (task,) = run["experiment"]["tasks"].values()
    return {
        "date": run.get("finished", ""), "commit": run.get("commit"), "environment": run["environment"],
        "command": run["command"], "setting": _setting(task), "seconds": run.get("seconds"), "rows": rows_of(results),
    }  # fmt: skip


def _setting(task: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the task, as plain values."""
    import ast

    return {name: ast.literal_eval(value) for name, value in task.items() if name != "task"}


def _machine(run: Mapping[str, Any]) -> str:
    surroundings = run["environment"]
    return str(surroundings.get("gpu") or f"{surroundings['cpu']}, {surroundings['cores']} cores")


def table(results: Results) -> Table:
    """All that was measured."""
    run = results.run
    (task,) = run["experiment"]["tasks"].values()
    setting = _setting(task)
    rows, half = rows_of(results), setting["dtype"] in ("bfloat16", "float16")
    memory, checked = any("memory" in row for row in rows), any("error" in row for row in rows)
    fastest = _fastest(rows, "slowest")
    columns = [
        Column("mask", text=True), Column("method", text=True), Column("grid", "heads x tokens"),
        Column("layout", text=True),
        *([Column("error", "to float64")] * checked), *([Column("ratio", "to one process")] * (checked and half)),
        Column("sent"), Column("formula"), Column("needed"), Column("between", "machines"), Column("balance"),
        Column("slowest", "ms"), Column("mean", "ms"), Column("rate", "TFLOP/s"), *([Column("memory")] * memory),
        Column("modelled", f"ms, {setting['cluster']}"),
    ]  # fmt: skip
    made_rows = []
    for row in rows:
        cells = _first(row)
        if "why" in row:
            made_rows.append([*cells, Cell("–", title=row["why"]), *[Cell("–")] * (len(columns) - 5)])
            continue
        cells += [_number(row, "error")] * checked + [_number(row, "error_ratio")] * (checked and half)
        gap = row["formula_gap"]
        cells += [
            _size(row, "sent"),
            Cell("=" if not gap else f"off by {gap:,.0f}"),
            _size(row, "least"),
            _size(row, "between"),
        ]
        cells += [
            Cell(f"{row['imbalance']:.2f}"),
            Cell(formatting.number(row["slowest"]), best=fastest[row["mask"]] is row),
        ]
        cells += [
            _number(row, "mean"),
            _number(row, "rate"),
            *([_size(row, "memory")] * memory),
            _number(row, "modelled"),
        ]
        made_rows.append(cells)
    way = "forward and backward" if setting["backward"] else "forward"
    title = (
        f"{setting['ranks']} processes, {setting['backend']}, {setting['tokens']:,} tokens, {setting['heads']} heads "
        f"with {setting['kv_heads']} of keys, {setting['width']} channels, {setting['dtype']}, {way}; "
        f"times of {_machine(run)}"
    )
    return Table(columns, made_rows, title, labels=2)


def _first(row: Mapping[str, Any]) -> list[Cell]:
    grid = f"{row['heads']} x {row['ranks'] // row['heads']}" if "ranks" in row else f"{row['heads']}"
    window = f", windows of {row['window']}" if "window" in row else ""
    return [Cell(row["mask"]), Cell(row["method"], title=row["exchange"] + window), Cell(grid), Cell(row["layout"])]


def _number(row: Mapping[str, Any], name: str) -> Cell:
    return Cell(formatting.number(row[name])) if name in row else Cell("–")


def _size(row: Mapping[str, Any], name: str) -> Cell:
    return Cell(formatting.size(row[name])) if name in row else Cell("–")


def _fastest(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if name in row and (row["mask"] not in found or row[name] < found[row["mask"]][name]):
            found[row["mask"]] = row
    return found


def _refusals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why methods could not do cases, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "why" in row:
            reasons.setdefault((row["method"], row["why"]), []).append(row["mask"])
    return [f"{method} on {', '.join(masks)}: {why}" for (method, why), masks in reasons.items()]


def _refused(rows: Sequence[Mapping[str, Any]]) -> Section:
    reasons = _refusals(rows)
    return Section("What could not be done", [Notes(reasons)] if reasons else [])


def _headlines(rows: Sequence[Mapping[str, Any]]) -> list[Headline]:
    ran = [row for row in rows if "why" not in row]
    off = [row for row in ran if row["formula_gap"]]
    lines = [Headline(f"{len(ran)} of {len(rows)} cases ran.", "Cases")]
    if errors := [row["error"] for row in ran if "error" in row]:
        lines.append(
            Headline(
                f"The largest difference from one process in float64 is {formatting.number(max(errors))}.", "Error"
            )
        )
    said = (
        "All bytes are those of the formulas."
        if not off
        else f"{len(off)} cases sent other bytes than the formulas say."
    )
    return [*lines, Headline(said, "Bytes")]


def page(results: Results) -> Page:
    """The page of a run."""
    run, shown, rows = results.run, table(results), rows_of(results)
    facts = [("times", _machine(run), "slowest and mean process; medians of rounds")]
    return Page(
        "Attention that processes share", "How methods share attention, on each mask", shown.title, _headlines(rows),
        [
            Section("Methods", [shown]), _refused(rows),
            Section("Read with care", [Notes(_CARE)]),
            made(run, facts, "The rows are in the folder units beside this page.", "made in Python"),
        ],
    )  # fmt: skip


def print_results(results: Results, console: Console) -> None:
    """Print a row for each mask and method, and what has to be known to read it."""
    rows = rows_of(results)
    print_table(table(results), console)
    print_lines([*_refusals(rows), *_CARE, f"report: {results.report}"], console)


def modelled_table(found: Mapping[str, Any]) -> Table:
    """Modelled times and counted bytes."""
    setting, rows = found["setting"], found["rows"]
    fastest = _fastest(rows, "modelled")
    columns = [
        Column("mask", text=True), Column("method", text=True), Column("heads", "shared by"),
        Column("layout", text=True),
        Column("balance"), Column("sent", "a process"), Column("needed"), Column("between", "machines"),
        Column("slowest", "modelled ms"), Column("mean", "modelled ms"), Column("rate", "TFLOP/s"),
    ]  # fmt: skip
    made_rows = []
    for row in rows:
        cells = _first(row)
        if "why" in row:
            made_rows.append([*cells, Cell("–", title=row["why"]), *[Cell("–")] * (len(columns) - 5)])
            continue
        cells += [Cell(f"{row['imbalance']:.2f}"), _size(row, "sent"), _size(row, "least"), _size(row, "between")]
        best = fastest[row["mask"]] is row
        cells += [
            Cell(formatting.number(row["modelled"]), best=best),
            _number(row, "modelled_mean"),
            _number(row, "rate"),
        ]
        made_rows.append(cells)
    way = "forward and backward" if setting["backward"] else "forward"
    title = (
        f"Modelled, not measured: {setting['ranks']:,} devices of {setting['cluster']}, {setting['node']} a machine, "
        f"{setting['tokens']:,} tokens, {setting['heads']} heads with {setting['kv_heads']} of keys, "
        f"{setting['dtype']}, {way}; efficiency {setting['efficiency']}"
    )
    return Table(columns, made_rows, title, labels=2)


def print_modelled(found: Mapping[str, Any], console: Console) -> None:
    """Print modelled times."""
    print_table(modelled_table(found), console)
    print_lines([*_refusals(found["rows"]), _CARE[-1]], console)


def modelled_page(found: Mapping[str, Any], run: Mapping[str, Any]) -> Page:
    """The page of modelled times."""
    shown = modelled_table(found)
    return Page(
        "Attention that processes share, modelled", "How methods would share attention", shown.title,
        [Headline("Nothing here was measured.", "Modelled")],
        [
            Section("Methods", [shown]),
            _refused(found["rows"]),
            made(run, [], _CARE[-1], "made in Python"),
        ],
    )  # fmt: skip
