# SPDX-License-Identifier: Apache-2.0
"""A summary as a table in the terminal."""

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .stats import Estimate
from .summary import FIGURES, ArmSummary, Summary

__all__ = ["budget_text", "print_summary", "size_text"]

_COLUMNS = {
    "loss": "loss Δ",
    "needle_unseen": "needle\nasked after",
    "needle_seen": "needle\nasked before",
    "several": "one of\nseveral",
    "chained": "chained",
}


def budget_text(budget: int | float) -> str:
    """``0.25`` -> ``25 %``; ``64`` -> ``64 slots``."""
    return f"{budget} slots" if isinstance(budget, int) else f"{100 * budget:g} %"


def size_text(size: float) -> str:
    """``20971520`` -> ``21.0 MB``, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def print_summary(summary: Summary, console: Console) -> None:
    """Print one row per arm and what has to be known to read it."""
    run = summary.results.run
    settings = run["settings"]
    shown = {name: title for name, title in _COLUMNS.items() if name in summary.full.figures}
    lengths = ", ".join(map(str, settings["lengths"]))
    table = Table(
        title=f"{run['model']['name']}, contexts of {lengths} tokens",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for heading in ("strategy", "budget", "cache held"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right", no_wrap=True)
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    if summary.full.decode:
        table.add_column("ms/token", justify="right", no_wrap=True)
    best = {name: summary.best(name) for name in shown}
    previous: str | None = None
    for arm in summary.arms:
        cells = [Text("" if arm.label == previous else arm.label), Text(budget_text(arm.budget)), _size(arm)]
        cells += [_figure(arm, name, arm.key in best[name]) for name in shown]
        if summary.full.decode:
            cells.append(_decode(arm, summary.full))
        table.add_row(*cells)
        previous = arm.label
    console.print(table)
    counts = "; ".join(
        f"{_COLUMNS[n].replace(chr(10), ' ')}: {f.n} in {f.contexts} contexts"
        for n, f in summary.full.figures.items()
        if n in shown
    )
    lines = [
        "second line: 95 % interval; * differs from full; green: best at its budget; loss Δ: nats/token (full: loss)",
        f"samples per arm: {counts}",
        *[f"skipped {task}: {reason}" for task, reason in run["skipped"].items()],
        f"seed {settings['seed']}; report: {summary.results.report}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _size(arm: ArmSummary) -> Text:
    if arm.bytes is None:
        return Text("")
    share = "" if arm.full or arm.kept is None else f"\n{100 * arm.kept:.1f} %"
    return Text(size_text(arm.bytes)).append(share, "dim")


def _figure(arm: ArmSummary, name: str, best: bool) -> Text:
    if name not in arm.figures:
        return Text("")
    kind, figure = FIGURES[name], arm.figures[name]
    shown = figure if kind.share or arm.full else arm.deltas[name]
    mark = "*" if name in arm.deltas and arm.deltas[name].excludes_zero else ""
    text = f"{100 * shown.value:.0f} %" if kind.share else f"{shown.value:.3f}" if arm.full else f"{shown.value:+.3f}"
    return Text(text + mark, "bold green" if best else "").append("\n" + _interval(shown, kind.share), "not bold dim")


def _interval(figure: Estimate, share: bool) -> str:
    if not math.isfinite(figure.low):
        return "one context"
    return f"{100 * figure.low:.0f} … {100 * figure.high:.0f}" if share else f"{figure.low:.2f} … {figure.high:.2f}"


def _decode(arm: ArmSummary, full: ArmSummary) -> Text:
    if arm.decode is None or full.decode is None:
        return Text("")
    ratio = "" if arm.full else f"\n×{arm.decode.value / full.decode.value:.2f}"
    return Text(f"{arm.decode.value:.1f}").append(ratio, "dim")
