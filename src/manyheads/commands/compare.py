# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads compare`` and ``manyheads report``. What they need is imported when they run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.compare import defaults
from manyheads.errors import UserError
from manyheads.progress import shown

from .options import (
    Device,
    Json,
    Model,
    Out,
    Quick,
    Resume,
    Samples,
    Seed,
    TextFiles,
    console,
    load_model,
    passive_threads,
    print_json,
    typed,
)  # fmt: skip

if TYPE_CHECKING:
    from manyheads.compare.results import Results

_TASKS = "loss,needle,several,chained,speed,memory"
_QUICK: dict[str, Any] = {"lengths": [512], "budgets": ["0.25"], "samples": 3, "rounds": 1}


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))  # spaces, where a narrow terminal can break the line


def compare(
    model: Model = None,
    text: TextFiles = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            help="Specs such as snapkv or snapkv:window_size=16,kernel_size=5. "
            f"\\[default: {_listed(defaults.STRATEGIES)}]"
        ),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(help=f"Fractions of the tokens (0.25) or slots (128). \\[default: {_listed(defaults.BUDGETS)}]"),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help=f"Some of {_TASKS}. \\[default: all]")] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Tokens of a context. \\[default: 1024,2048]")] = None,
    samples: Samples = None,
    seed: Seed = None,
    device: Device = None,
    out: Out = None,
    resume: Resume = None,
    quick: Quick = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train a small model for each strategy that is a token mixer, and compare.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="With --train: tokens of each arm (2M) or time of all (10m). \\[default: 600k]"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="With --train: about so long in all, in place of --budget. \\[cuda: 8]")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="With --train: trainings of each arm. \\[default: 3]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare strategies on a model and text: quality, memory and speed, each with its uncertainty.

    Without options: the shipped model reads the source of Python's standard library, in under two minutes on two cores.
    With --train: small models are trained from scratch, one token mixer each, all on one budget.
    The results go to a folder with a report page. A run that was cut off goes on when it is given the same options and
    --out, or with --resume.
    """
    given: dict[str, Any] = {
        "model": model and _place(model),
        "text": text and [_place(path) for path in text],
        "strategies": _specs(strategies),
        "budgets": _items(budgets),
        "tasks": _items(tasks),
        "lengths": [_whole(length) for length in _items(lengths) or []] or None,
        "samples": samples,
        "seed": seed,
        "device": device,
        "quick": quick or None,
        "train": train or None,
        "budget": budget,
        "minutes": minutes,
        "seeds": seeds,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        options = _resumed(resume, options)
        if out is not None and out.resolve() != resume.resolve():
            raise UserError("--resume goes on in its own folder; leave --out away")
        out = resume
    from manyheads.compare.train.command import refuse

    refuse(options)
    _show(_run(options, out, as_json), as_json)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `manyheads compare` wrote.")],
    as_json: Json = False,
) -> None:
    """Build the report page of a run again from its rows, and print the table."""
    from manyheads.compare.results import Results

    _show(Results.read(folder), as_json)


def _run(options: dict[str, Any], out: Path | None, as_json: bool) -> Results:
    """Check everything that can be checked without the model, load it, compare."""
    passive_threads()
    from manyheads.compare.results import Results, folder_for

    folder, finished = folder_for(out, options)
    if finished:
        return Results.read(folder)
    if options.get("train"):
        from manyheads.compare.train.command import run

        with shown(as_json) as progress:
            return run(options, folder, progress)
    chosen = {**(_QUICK if options.get("quick") else {}), **options}
    from manyheads.compare import runner
    from manyheads.data.texts import read

    texts = read(options["text"]) if "text" in options else None
    passed = ("strategies", "budgets", "tasks", "lengths", "samples", "rounds", "seed")
    arguments = {name: value for name, value in chosen.items() if name in passed}
    runner.check(**{k: v for k, v in arguments.items() if k in ("strategies", "budgets", "tasks", "lengths")})
    model, tokenizer = load_model(options.get("model"), options.get("device"))
    with shown(as_json) as progress:
        return runner.compare(
            model, tokenizer, texts, out=folder, origin=options.get("model", "the shipped model"),
            command=typed(), options=options, progress=progress,
            **arguments,
        )  # fmt: skip


def _resumed(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the run in ``folder``; UserError if others are ``given``."""
    from manyheads.compare.results import read_run

    options: dict[str, Any] = read_run(folder)["options"]
    if other := [name for name, value in given.items() if options.get(name) != value]:
        raise UserError(
            f"--resume goes on with the options of the run in {folder}; leave --{' and --'.join(other)} away"
        )
    return options


def _show(results: Results, as_json: bool) -> None:
    """Write the report page and print the figures."""
    trained = results.run.get("kind") == "train"
    summary = import_module(f"manyheads.compare{'.train' if trained else ''}.summary")
    shown_by = import_module(f"manyheads.report.{'train' if trained else 'compare'}")
    from manyheads.report.page import write

    found = summary.summarise(results)
    write(shown_by.page(found), results.report)
    if as_json:
        print_json(found.document())
    else:
        shown_by.print_summary(found, console())


def _items(values: list[str] | None) -> list[str] | None:
    """The pieces of comma-separated options, None if none was given."""
    return None if values is None else [item.strip() for value in values for item in value.split(",") if item.strip()]


def _specs(values: list[str] | None) -> list[str] | None:
    from manyheads.spec import split_list

    return None if values is None else [spec for value in values for spec in split_list(value)]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"a length is a number of tokens, not {text!r}; write for instance --lengths 1024,2048")
    return int(text)


def _place(path: str) -> str:
    """An existing path made absolute, so that a run can go on from another folder; a hub name as it is."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path
