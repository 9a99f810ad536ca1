# SPDX-License-Identifier: Apache-2.0
"""The command line: the app, its verbs by name, and what becomes of errors.

The verbs are functions (or an app of further verbs) in :mod:`manyheads.commands`, a file each; a verb's file is
imported for that verb and for ``--help`` only, and keeps its own heavy imports inside the function.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from manyheads import __version__
from manyheads.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Verbs: name -> "file:function" in manyheads.commands.
_VERBS = {
    "compare": "compare:compare", "report": "compare:report", "train": "train:train", "predict": "train:predict",
    "inspect": "inspect:inspect", "doctor": "inspect:doctor",
    "ask": "ask:ask", "generate": "generate:generate", "hunt": "hunt:hunt", "detect": "detect:detect",
    "recommend": "recommend:recommend", "shorten": "shorten:shorten", "convert": "convert:convert",
    "parallel": "parallel:parallel",
    "list": "catalog:list_papers", "find": "catalog:find", "show": "catalog:show", "tasks": "catalog:list_tasks",
    "claims": "claims:app", "lm-eval": "lm_eval:app",
}  # fmt: skip


class _LazyGroup(TyperGroup):
    """The group of all verbs; each is imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _VERBS:
            return super().get_command(ctx, cmd_name)
        module, _, name = _VERBS[cmd_name].partition(":")
        verb = getattr(import_module(f"manyheads.commands.{module}"), name)
        if not isinstance(verb, typer.Typer):
            function, verb = verb, typer.Typer(add_completion=False)
            verb.command(cmd_name)(function)
        made = typer.main.get_command(verb)
        made.name = cmd_name
        return made

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in _VERBS:
            from difflib import get_close_matches

            close = get_close_matches(args[0], _VERBS)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_VERBS)}"
            raise UserError(f"no such command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_LazyGroup, add_completion=False, pretty_exceptions_enable=False)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 with one line on stderr for a mistake in what was given.

    Args:
        arguments: what follows the program's name, ``sys.argv[1:]`` when None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest = [argument for argument in given if argument != "--debug"]
    debug = len(rest) < len(given)
    written, warnings.formatwarning = warnings.formatwarning, _one_line
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
    finally:
        warnings.formatwarning = written
    if code == 130:
        typer.echo("interrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """How a warning is printed: without the line of code, which is not the user's here."""
    return f"warning: {' '.join(str(message).split())}\n"


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
