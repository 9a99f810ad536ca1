# SPDX-License-Identifier: Apache-2.0
"""What an inspection found, for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .figures import number
from .run import WHERE

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..heads import HeadTable
    from .doctor import Diagnosis
    from .run import Inspection

__all__ = ["print_diagnosis", "print_findings"]

_TOP = 3


def print_findings(seen: Inspection, place: Path, console: Console) -> None:
    """The first heads of every score with their intervals over prompts, the notes, and where the page is."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = seen.run
    console.print(
        f"{run['model']['name']}: {run['settings']['samples']} prompt(s) of {run['settings']['length']} tokens, seed "
        f"{run['settings']['seed']}, loss {seen.loss:.3f} nats/token",
        markup=False,
    )
    for spec, found in seen.found.items():
        table = Table(title=Text(spec), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("score", no_wrap=True)
        for place_ in ("highest", "second", "third"):
            table.add_column(place_)
        table.add_column("median", justify="right")
        for name, made in found.tables.items():
            if spec != WHERE or name in seen.parts or name == "entropy":
                cells = _cells(made)
                table.add_row(Text(name), *(Text(c) for c in cells), Text(_median(made)))
        console.print(table)
        for note in found.notes:
            console.print(f"  {note}", markup=False)
        if found.notes:
            console.print()
    if seen.curve:
        score, curve = seen.curve
        loss, control = curve.ranked, curve.control
        console.print(
            f"Without the {curve.counts[-1]} heads highest in {score} the loss is {loss[-1] - loss[0]:+.3f} nats; "
            f"without as many random heads of the same layers {control[:, -1].min() - loss[0]:+.3f} to "
            f"{control[:, -1].max() - loss[0]:+.3f}.",
            markup=False,
        )
    console.print(f"page: {place}", markup=False, soft_wrap=True)


def _cells(made: HeadTable) -> list[str]:
    """Up to three heads (or layers) as ``3.1 0.82 (0.8 to 0.84)``."""
    mean, (low, high) = made.mean, made.interval()
    cells = []
    for head in made.top(_TOP):
        (name,) = made.names([head])
        name = f"layer {name.partition('.')[0]}" if mean.shape[1] == 1 else name
        range_ = f" ({number(low[head])} to {number(high[head])})" if math.isfinite(low[head]) else ""
        cells.append(f"{name}  {number(mean[head])}{range_}")
    return cells + [""] * (_TOP - len(cells))


def _median(made: HeadTable) -> str:
    import numpy as np

    known = made.mean[np.isfinite(made.mean)]
    return number(float(np.median(known))) if known.size else "–"


def print_diagnosis(found: Diagnosis, place: Path, console: Console) -> None:
    """What is unusual, one line a finding, what to do about it below."""
    from rich.padding import Padding
    from rich.text import Text

    run = found.run
    console.print(
        f"{run['model']['name']}: {run['settings']['samples']} prompt(s) of {run['settings']['length']} tokens, seed "
        f"{run['settings']['seed']}, loss {found.loss:.3f} nats/token",
        markup=False,
    )
    styles = {"watch": "bold yellow", "note": "cyan", "fine": "green", "unknown": "dim"}
    for check in found.checks:
        head = Text.assemble((f"{check.level:7}", styles[check.level]), (check.title, "bold"), f": {check.figure}")
        message = Text(f"{check.message} {check.advice}".strip())
        message.append(f" (threshold: {check.threshold})" if check.threshold else "", "dim")
        console.print(head)
        console.print(Padding(message, (0, 0, 1, 7)))
    console.print(f"page: {place}", markup=False, soft_wrap=True)
