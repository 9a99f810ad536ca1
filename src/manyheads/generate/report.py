# SPDX-License-Identifier: Apache-2.0
"""What was measured: facts, a table of them, and the grid."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..environment import environment
from . import grid
from .rows import Row
from .run import Made, Settings

__all__ = ["draw", "facts", "print_json", "print_table"]


def facts(made: Sequence[Made], rows: Sequence[Row], settings: Settings, pipe: Any) -> dict[str, Any]:
    """What was asked and what each arm cost and changed, of JSON's types.

    ``mean_difference`` (0 to 1) and ``psnr`` (dB) are to the baseline; ``psnr`` is None for the same images.
    """
    base = made[0]
    return {
        "pipeline": type(pipe).__name__,
        "steps": settings.steps, "guidance": settings.guidance, "size": settings.size,
        "rows": [
            {"seed": r.seed, "prompt": r.prompt, "source": r.source, "class": r.number} for r in rows
        ],
        "arms": [
            {
                "arm": each.arm.name, "strategies": [s.spec for s in each.arm.strategies],
                "seconds": each.seconds, "ratio": each.seconds / base.seconds,
                "denoiser_calls": each.calls, "denoiser_rows": each.passed,
                "mean_difference": each.difference(base), "psnr": each.psnr(base),
                "peak_bytes": each.peak, "kept_bytes": each.kept,
            }
            for each in made
        ],
        "environment": environment() | {"diffusers": diffusers.__version__},
    }  # fmt: skip


def draw(made: Sequence[Made], rows: Sequence[Row], facts: Mapping[str, Any], out: Path) -> None:
    """Write the grid: the sources of pairs, the baseline, and each arm with its difference."""
    base = made[0]
    seconds = f"{base.seconds:.3g} s"
    columns = [grid.Column("source", "", base.sources)] if base.sources else []
    columns.append(grid.Column("target alone" if base.sources else "baseline", seconds, base.images))
    for each, known in zip(made[1:], facts["arms"][1:], strict=True):
        apart = [np.abs(a - b).mean(-1) for a, b in zip(each.images, base.images, strict=True)]
        columns.append(grid.Column(each.arm.name, f"{known['ratio']:.2f} \u00d7 the time", each.images))
        columns.append(grid.Column("difference", _psnr(known["psnr"]), apart))
    settings = [f"{name} {facts[name]}" for name in ("steps", "guidance") if facts[name] is not None]
    seeds = list(dict.fromkeys(row.seed for row in rows))
    footer = ", ".join([facts["model"], *settings, f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"])
    labels = [row.label for row in rows]
    moving = max(len(image) for image in base.images) > 1
    if moving and out.suffix.lower() not in grid.MOVING:
        grid.save([grid.strip(columns, labels, footer)], out)
    else:
        grid.save(grid.sheets(columns, labels, footer), out)


def print_json(facts: Mapping[str, Any]) -> None:
    """Print the facts as they are."""
    typer.echo(json.dumps(facts, indent=2, allow_nan=False, ensure_ascii=False))


def print_table(facts: Mapping[str, Any], page: Path | None) -> None:
    """Print what each arm cost and changed, and where the images are."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("arm")
    for heading in ("seconds", "time", "denoiser rows", "PSNR", "mean difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for n, arm in enumerate(facts["arms"]):
        change = (_psnr(arm["psnr"]).removeprefix("PSNR "), f"{arm['mean_difference']:.4f}") if n else ("", "")
        table.add_row(
            Text(arm["arm"]), f"{arm['seconds']:.2f}", f"{arm['ratio']:.2f} \u00d7", str(arm["denoiser_rows"]), *change
        )
    console.print(table)
    for arm in facts["arms"][1:]:
        if arm["psnr"] is None:
            console.print(f"{arm['arm']} changed nothing: look at its steps and layers", markup=False)
    console.print(f"grid: {facts['out']}", markup=False, soft_wrap=True)
    if page is not None:
        console.print(f"maps: {page}", markup=False, soft_wrap=True)


def _psnr(value: float | None) -> str:
    return "the same" if value is None else f"PSNR {value:.1f} dB"
