# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads claims`` and ``manyheads claims run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyheads import catalog, claims

from .options import Json, Quick, Slug, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(invoke_without_command=True)


@app.callback()
def list_claims(ctx: typer.Context, as_json: Json = False) -> None:
    """List the claims that can be checked here, with their verdicts; `claims run SLUG` checks one."""
    if ctx.invoked_subcommand:
        return
    records = claims.records()
    if as_json:
        print_json([record.row() for record in records])
        return
    screen = console(140)
    for record in records:
        print_record(screen, record)
        screen.print()
    if not records:
        screen.print("No claim stands yet.")


@app.command("run")
def run_claim(
    slug: Slug,
    quick: Quick = False,
    device: Annotated[claims.Device, typer.Option(help="Where to run it.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Check the claim of one paper on this machine and store the result beside it."""
    catalog.get(slug)
    claim = claims.load(slug)
    screen = console(140, stderr=True)
    with screen.status(f"{slug}: {claim.statement}") as status:

        def progress(message: str, done: float) -> None:
            status.update(f"{slug}: {message} ({done:.0%})")

        result = claims.run(slug, claims.Setting(device=device, quick=quick, progress=progress))
    record = claims.Record(slug, claim.statement, claim.paper_figure, (result,))
    if as_json:
        print_json(record.row())
    else:
        print_record(console(140), record)
    path = claims.store(claim, result)
    screen.print(f"stored in {path}", markup=False, soft_wrap=True)


def print_record(console: Console, record: claims.Record) -> None:
    """Print a claim and what the deciding run gave."""
    colour = {"holds": "green", "does not hold here": "red", None: "dim"}.get(record.verdict, "yellow")
    console.print(f"[bold]{record.slug}[/] [{colour}]{record.verdict or 'not run yet'}[/]")
    console.print(f"claim: {record.statement}", markup=False)
    console.print(f"paper: {record.paper_figure}", markup=False)
    if result := record.deciding:
        console.print(f"here: {result.reason}", markup=False)
        for figure in result.figures:
            console.print(f"  {figure}", markup=False)
        machine = result.environment.get("gpu") if result.device == "cuda" else result.environment.get("cpu")
        size = "quick run" if result.quick else "full run"
        took = "" if result.seconds is None else f"{result.seconds:.0f} s "
        console.print(f"{size}, {took}on {machine}, {result.date}: {result.command}", style="dim")
