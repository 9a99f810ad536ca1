# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads claims``, ``claims run`` and ``claims summary``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manyheads import catalog, claims
from manyheads.errors import UserError

from .options import Json, Quick, RayAddress, Slug, Workers, console, executor, passive_threads, print_json, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyheads.experiment.claim import Claim, ClaimResult, ClaimRun
    from manyheads.experiment.executors import Executor
    from manyheads.progress import Progress
    from manyheads.report.claims import Shown

FOLDER = "manyheads-claims"
PAGE = "claims.html"

PagePath = Annotated[Path | None, typer.Option("--page", help="Write a page with every check of every claim here.")]

app = typer.Typer(invoke_without_command=True)


@app.callback()
def claims_(ctx: typer.Context, as_json: Json = False, page: PagePath = None) -> None:
    """List the claims that can be checked here, with what their checks say; `claims run SLUG` checks one."""
    if not ctx.invoked_subcommand:
        list_claims(as_json, page)


@app.command("list")
def list_claims(as_json: Json = False, page: PagePath = None) -> None:
    """List the claims that can be checked here, with what their checks say."""
    from manyheads.report.claims import line_table
    from manyheads.report.table import print_table

    found = {slug: claims.stored(slug) for slug in claims.slugs()}
    if as_json:
        print_json([
            {"slug": slug, "checks": catalog.get(slug).checks, "results": [one.plain() for one in results]}
            for slug, results in found.items()
        ])  # fmt: skip
        return
    shown = [one for slug, results in found.items() for one in stored_runs(slug, results)]
    if page is not None:
        _write_page(shown, page, "--page")
    print_table(line_table(shown), console(140))


@app.command("show")
def show_claim(slug: Slug) -> None:
    """Show a claim: what the paper reports, every check with its interval, and on what it ran."""
    from manyheads.report.claims import print_run

    results = claims.stored(claims.known(slug))
    for one in stored_runs(slug, results):
        print_run(one, console(140))


@app.command("run")
def run_claims(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Names of papers, as `manyheads claims` shows them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every claim.")] = False,
    quick: Quick = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run them.")] = "cpu",
    workers: Workers = None,
    ray: RayAddress = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a causal LM to check it on. \\[default: the claim's own subject]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the rows; a run that was cut off goes on from them.")] = Path(
        FOLDER
    ),
    as_json: Json = False,
) -> None:
    """Check claims of papers on this machine and store the results.

    One claim that fails does not stop the others. A run that was cut off goes on when the command is given again.
    """
    from manyheads.progress import shown as progress_shown
    from manyheads.report.claims import line_table, print_run
    from manyheads.report.table import print_lines, print_table

    if bool(slugs) == all_:
        raise UserError("name the claims to run, or give --all; `manyheads claims` lists them")
    loaded = [(slug, _load(slug)) for slug in (claims.slugs() if all_ else dict.fromkeys(slugs or ()))]
    passive_threads()
    where, found = executor(workers, ray), []
    failures: list[Exception] = []
    with progress_shown(as_json) as progress:
        for number, (slug, claim) in enumerate(loaded):
            told = _part(progress, number, len(loaded), slug)
            one, failure = _run(slug, claim, quick, device, out, model, where, told)
            found.append(one)
            failures += [failure] if failure else []
    if failures and len(loaded) == 1:
        raise failures[0]
    path = _write_page(found, out / PAGE, "--out")
    if as_json:
        print_json([_plain(one) for one in found])
    else:
        screen = console(140)
        if len(found) == 1:
            print_run(found[0], screen)
        else:
            print_table(line_table(found), screen)
        print_lines([f"stored in {claims.results_folder()}; page: {path}"], screen)
    if failures:
        failed = ", ".join(one.slug for one in found if one.error)
        typer.echo(f"error: {len(failures)} of {len(loaded)} claims failed: {failed}", err=True)
        raise typer.Exit(2 if all(isinstance(failure, UserError) for failure in failures) else 1)


@app.command("summary", hidden=True)
def write_summary() -> None:
    """Write what the stored results say in a line into the package, for installations without the results."""
    from manyheads.files import write_atomically

    if claims.results_folder() != catalog.PACKAGE.parents[1] / "results" / "claims":
        raise UserError("the summary is made from the results of a checkout; run this in one")
    write_atomically(claims.SUMMARY, json.dumps(claims.summary(), indent=1, ensure_ascii=False) + "\n")
    typer.echo(f"wrote {claims.SUMMARY}")


def stored_runs(slug: str, results: Sequence[ClaimResult]) -> list[Shown]:
    """The deciding run of every device and subject, or what the package knows of a claim that was not run here."""
    from manyheads.report.claims import Shown

    if results:
        return [Shown(slug=slug, statement=one.statement, run=one.deciding) for one in results]
    return [Shown(slug=slug, statement="", known=catalog.get(slug).checks)]


def _load(slug: str) -> tuple[Claim | None, Exception | None]:
    """A claim, or what is wrong with its file; UserError where there is none of that name."""
    try:
        return claims.load(slug), None
    except UserError:
        raise
    except Exception as error:
        return None, error


def _run(
    slug: str, loaded: tuple[Claim | None, Exception | None], quick: bool, device: Literal["cpu", "cuda"], out: Path,
    model: str | None, where: Executor | None, progress: Progress,
) -> tuple[Shown, Exception | None]:  # fmt: skip
    """Run and store one claim; what went wrong is returned."""
    from manyheads.experiment.claim import run_claim, store
    from manyheads.report.claims import Shown

    claim, failure = loaded
    if claim is None:
        return Shown(slug=slug, statement="", error=_line(failure)), failure
    size: Any = "quick" if quick else device
    reported = f"{claim.reported.value} ({claim.reported.setting}; {claim.reported.where})"
    one = Shown(slug=slug, statement=claim.statement, reported=reported, caveat=claim.caveat)
    place = out / ".".join(filter(None, (slug, device, size, model and Path(model).name)))
    try:
        run: ClaimRun = run_claim(claim, size, device, place, on=model, executor=where, progress=progress)
        store(claim, run, claims.results_folder())
    except Exception as error:
        return dataclasses.replace(one, error=_line(error)), error
    return dataclasses.replace(one, run=run), None


def _line(error: Exception | None) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"


def _part(progress: Progress, number: int, count: int, slug: str) -> Progress:
    """Progress of one claim as a part of that of all."""

    def told(done: float, total: float, message: str) -> None:
        progress(number + done / (total or 1), count, f"{slug}: {message}" if message else "")

    return told


def _plain(one: Shown) -> dict[str, Any]:
    run = one.run
    return {
        "slug": one.slug, "statement": one.statement, "line": one.line, "error": one.error or None,
        "tier": run.tier if run else None, "seconds": run.seconds if run else None, "run": run.plain() if run else None,
    }  # fmt: skip


def _write_page(shown: Sequence[Shown], path: Path, option: str) -> Path:
    import datetime

    from manyheads.environment import environment
    from manyheads.report.claims import page
    from manyheads.report.page import write

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return write(page(shown, {"command": typed(), "environment": environment(), "date": now}), path, option)
