# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads generate`` shows: the images side by side, and a table of what each arm cost and changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import grids
from .table import Cell, Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ..generate.rows import Row
    from ..generate.run import Made

__all__ = ["draw", "print_facts", "table"]


def draw(made: Sequence["Made"], rows: Sequence["Row"], facts: Mapping[str, Any], out: Path) -> None:
    """Write the grid: sources of pairs or images that are filled in, the baseline, and each arm with its difference."""
    base = made[0]
    seconds = f"{base.seconds:.3g} s"
    columns = [grids.Column("source", "", base.sources)] if base.sources else []
    paired = base.sources and rows[0].source is not None  # beside its source, and no image that is filled in
    columns.append(grids.Column("target alone" if paired else "baseline", seconds, base.images))
    for each, known in zip(made[1:], facts["arms"][1:], strict=True):
        apart = [np.abs(a - b).mean(-1) for a, b in zip(each.images, base.images, strict=True)]
        columns.append(grids.Column(each.arm.name, f"{known['ratio']:.2f} \u00d7 the time", each.images))
        columns.append(grids.Column("difference", _psnr(known["psnr"]), apart))
    settings = [f"{name} {facts[name]}" for name in ("steps", "guidance") if facts[name] is not None]
    seeds = list(dict.fromkeys(row.seed for row in rows))
    footer = ", ".join([facts["model"], *settings, f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"])
    labels = [row.label for row in rows]
    moving = max(len(image) for image in base.images) > 1
    if moving and out.suffix.lower() not in grids.MOVING:
        grids.save([grids.strip(columns, labels, footer)], out)
    else:
        grids.save(grids.sheets(columns, labels, footer), out)


def table(facts: Mapping[str, Any]) -> Table:
    """One row per arm: its time, its calls, and how far its images are from the baseline's."""
    columns = [
        Column("arm", text=True), Column("seconds"), Column("time"), Column("denoiser rows"),
        Column("PSNR"), Column("mean difference"),
    ]  # fmt: skip
    rows = []
    for n, arm in enumerate(facts["arms"]):
        change = (_psnr(arm["psnr"]).removeprefix("PSNR "), f"{arm['mean_difference']:.4f}") if n else ("", "")
        rows.append(
            [
                arm["arm"],
                f"{arm['seconds']:.2f}",
                f"{arm['ratio']:.2f} \u00d7",
                Cell(str(arm["denoiser_rows"])),
                *change,
            ]
        )
    return Table(columns, rows)


def print_facts(facts: Mapping[str, Any], page: Path | None, console: "Console") -> None:
    """Print what each arm cost and changed, and where the images are."""
    print_table(table(facts), console)
    same = [arm["arm"] for arm in facts["arms"][1:] if arm["psnr"] is None]
    print_lines([f"{arm} changed nothing: look at its steps and layers" for arm in same], console)
    print_lines([f"grid: {facts['out']}", *([] if page is None else [f"maps: {page}"])], console)


def _psnr(value: float | None) -> str:
    return "the same" if value is None else f"PSNR {value:.1f} dB"
