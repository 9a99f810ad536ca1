# SPDX-License-Identifier: Apache-2.0
"""The command line: a thin face over the public functions.

Nothing here imports torch before a command needs it. A verb with many options lives beside its subject as a plain
function and is named in `_VERBS`; its file is imported for that verb and for ``--help`` only, so it keeps its own heavy
imports inside the function.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from manyheads import __version__, catalog, claims
from manyheads.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from manyheads.strategy import Strategy

# Verbs that live elsewhere: name -> "module:function".
_VERBS = {
    "compare": "manyheads.compare.command:compare",
    "report": "manyheads.compare.command:report",
    "inspect": "manyheads.inspect.command:inspect",
    "doctor": "manyheads.inspect.command:doctor",
    "generate": "manyheads.generate.command:generate",
}

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quick = Annotated[bool, typer.Option("--quick", help="At most 30 s on two cores; never outvotes a full run.")]
Category = Annotated[str | None, typer.Option(help="Only this category: caches, mixers, domains/vision, domains ...")]
State = Annotated[str | None, typer.Option(help="Only this state: planned, strategy, claim, holds ...")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Name of a paper or baseline, as `manyheads list` shows it.")]


class _LazyGroup(TyperGroup):
    """The group of all verbs; those of `_VERBS` are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*_VERBS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _VERBS:
            return super().get_command(ctx, cmd_name)
        module, _, function = _VERBS[cmd_name].partition(":")
        verb = typer.Typer(add_completion=False)
        verb.command(cmd_name)(getattr(import_module(module), function))
        return typer.main.get_command(verb)


app = typer.Typer(cls=_LazyGroup, add_completion=False, pretty_exceptions_enable=False)
claims_app = typer.Typer(invoke_without_command=True)
app.add_typer(claims_app, name="claims")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manyheads {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compare attention strategies of many papers on your own model and text."""


@app.command("list")
def list_papers(
    category: Category = None,
    state: State = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the papers and what stands of each."""
    papers = _select(catalog.papers(), category, state)
    if markdown:
        typer.echo(catalog.markdown(papers + _select(catalog.baselines(), category, state)))
        return
    if as_json:
        _print_json([paper.row() for paper in papers])
        return
    console = _console()
    console.print(_table(papers, f"{len(papers)} papers"))
    if baselines := _select(catalog.baselines(), category, state):
        console.print(_table(baselines, f"{len(baselines)} baselines, to measure them against"))


@app.command()
def find(
    words: Annotated[str, typer.Argument(help='What you look for, as "shrink the cache without training".')],
    limit: Annotated[int, typer.Option(min=1, help="The most rows to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Search papers and baselines by words."""
    found = catalog.find(words, limit)
    if as_json:
        _print_json([{**paper.row(), "score": round(score, 3)} for paper, score in found])
        return
    if not found:
        raise UserError(f"nothing matches {words!r}; try other words, or `manyheads list`")
    _console().print(_table([paper for paper, _ in found], "best first"))


@app.command()
def show(slug: Slug, as_json: Json = False) -> None:
    """Show one strategy: what it does, its fields, how to write it, and what its claim gave."""
    paper = catalog.get(slug)
    record = claims.stored(paper.slug)
    row: dict[str, Any] = paper.row() | {
        "doc": None,
        "fields": [],
        "spec": None,
        "claim": record.row() if record else None,
    }
    if paper.state != "planned":
        named = catalog.strategies(slug) if slug == paper.slug else {slug: catalog.load(slug)}
        parts = [_strategy_row(name, strategy) for name, strategy in named.items()]
        row |= parts[0] if len(parts) == 1 else {"parts": parts}
    if as_json:
        _print_json(row)
        return
    console = _console()
    number = "baseline" if paper.baseline else f"paper {paper.id}"
    console.print(f"[bold]{slug}[/] ({number}, {paper.category}, {paper.state})")
    arxiv = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
    needs = {"none": "no training", "calibration": "a calibration pass", "required": "training"}[paper.training]
    lines = [paper.title, arxiv, paper.summary, f"needs {needs}; {', '.join(paper.tags)}"]
    for line in filter(None, lines):
        console.print(line, markup=False)
    for part in row.get("parts", [row]) if paper.state != "planned" else []:
        console.print(f"\n{part['doc']}", markup=False)
        console.print(_field_table(part["fields"]))
        console.print(f'with manyheads.use(model, "{part["spec"]}"):', markup=False)
    if paper.state == "planned":
        console.print("\nIts strategy does not stand yet.")
    if record:
        console.print()
        _print_record(console, record)


@claims_app.callback()
def list_claims(ctx: typer.Context, as_json: Json = False) -> None:
    """List the claims that can be checked here, with their verdicts; `claims run SLUG` checks one."""
    if ctx.invoked_subcommand:
        return
    records = claims.records()
    if as_json:
        _print_json([record.row() for record in records])
        return
    console = _console()
    for record in records:
        _print_record(console, record)
        console.print()
    if not records:
        console.print("No claim stands yet.")


@claims_app.command("run")
def run_claim(
    slug: Slug,
    quick: Quick = False,
    device: Annotated[claims.Device, typer.Option(help="Where to run it.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Check the claim of one paper on this machine and store the result beside it."""
    catalog.get(slug)
    claim = claims.load(slug)
    console = _console(stderr=True)
    with console.status(f"{slug}: {claim.statement}") as status:

        def progress(message: str, done: float) -> None:
            status.update(f"{slug}: {message} ({done:.0%})")

        result = claims.run(slug, claims.Setting(device=device, quick=quick, progress=progress))
    record = claims.Record(slug, claim.statement, claim.paper_figure, (result,))
    if as_json:
        _print_json(record.row())
    else:
        _print_record(_console(), record)
    path = claims.store(claim, result)
    console.print(f"stored in {path}", markup=False, soft_wrap=True)


def _select(papers: list[catalog.Paper], category: str | None, state: str | None) -> list[catalog.Paper]:
    """Return the rows of a category (or of all below it) and of a state."""
    categories = catalog.categories()
    if category is not None and not any(f"{known}/".startswith(f"{category.rstrip('/')}/") for known in categories):
        close = catalog.nearest(category, categories)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(categories)}"
        raise UserError(f"unknown category {category!r}: {hint}")
    if state is not None and state not in catalog.STATES:
        raise UserError(f"unknown state {state!r}; there are {', '.join(catalog.STATES)}")
    return [
        paper
        for paper in papers
        if (category is None or f"{paper.category}/".startswith(f"{category.rstrip('/')}/"))
        and state in (None, paper.state)
    ]


def _strategy_row(slug: str, strategy: type[Strategy]) -> dict[str, Any]:
    """Return slug, docstring, fields and spec example of a strategy that stands."""
    import dataclasses
    import inspect

    module = sys.modules[strategy.__module__]
    fields = [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(strategy)
    ]
    example = next((f"{f['name']}={f['default']}" for f in fields if f["default"] is not None), "")
    return {
        "strategy": slug,
        "doc": inspect.cleandoc(module.__doc__ or strategy.__doc__ or ""),
        "fields": fields,
        "spec": f"{slug}:{example}" if example else slug,
    }


def _console(stderr: bool = False) -> Console:
    """Return a console that does not squeeze tables when the output is not a terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=140)


def _table(papers: Sequence[catalog.Paper], title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("slug", no_wrap=True)
    table.add_column("category", no_wrap=True)
    table.add_column("state")
    table.add_column("needs training")
    table.add_column("what it does", ratio=1)
    for row in papers:
        number = "" if row.id is None else str(row.id)
        table.add_row(number, row.slug, row.category, row.state, row.training, Text(row.summary))
    return table


def _field_table(fields: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("field", "default", "meaning"):
        table.add_column(heading)
    for field in fields:
        table.add_row(Text(field["name"]), Text(str(field["default"])), Text(field["help"]))
    return table


def _print_record(console: Console, record: claims.Record) -> None:
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


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, default=str))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 with one line on stderr for a mistake in what was given.

    Args:
        arguments: what follows the program's name, ``sys.argv[1:]`` when None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest = [argument for argument in given if argument != "--debug"]
    debug = len(rest) < len(given)
    try:
        code = typer.main.get_command(app).main(rest or ["--help"], prog_name="manyheads", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = 1
    except Exception as error:
        if debug:
            raise
        code = _explain(error)
    if code == 130:
        typer.echo("interrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """Say on stderr what went wrong, in a line; return the exit code."""
    usage = getattr(error, "format_message", None)  # of typer's own usage errors
    if usage:
        typer.echo(f"error: {' '.join(usage().split())}", err=True)
        typer.echo("`manyheads --help` shows the commands, `manyheads COMMAND --help` their options", err=True)
        return 2
    if isinstance(error, UserError):
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        return 2
    text = " ".join(str(error).split())
    typer.echo(f"error: {type(error).__name__}: {text}; this is a defect, --debug shows where", err=True)
    return 1
