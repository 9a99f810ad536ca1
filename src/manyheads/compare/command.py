# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads compare`` and ``manyheads report``. What they need is imported when they run."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.progress import shown

from . import defaults

if TYPE_CHECKING:
    from .results import Results

_TASKS = "loss,needle,several,chained,speed,memory"
_QUICK: dict[str, Any] = {"lengths": [512], "budgets": ["0.25"], "samples": 3, "rounds": 1}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))  # spaces, where a narrow terminal can break the line


def compare(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a causal LM. \\[default: the shipped one]")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of text or code; may repeat. \\[default: the standard library]"),
    ] = None,
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
    lengths: Annotated[
        list[str] | None, typer.Option(help=f"Tokens of a context. \\[default: {_listed(defaults.LENGTHS)}]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help=f"Contexts per task and length. \\[default: {defaults.SAMPLES}]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all draws. \\[default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. \\[default: cpu]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. \\[default: manyheads-report, or the next free one]")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder; needs no other option.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small run: one length, one budget, few samples.")] = False,
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
    from .train.command import refuse

    refuse(options)
    _show(_run(options, out, as_json), as_json)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `manyheads compare` wrote.")],
    as_json: Json = False,
) -> None:
    """Build the report page of a run again from its rows, and print the table."""
    from .results import Results

    _show(Results.read(folder), as_json)


def _run(options: dict[str, Any], out: Path | None, as_json: bool) -> Results:
    """Check everything that can be checked without the model, load it, compare."""
    # Threads that wait for one another by spinning make a busy machine several times slower. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .results import Results, folder_for

    folder, finished = folder_for(out, options)
    if finished:
        return Results.read(folder)
    if options.get("train"):
        from .train.command import run

        with shown(as_json) as progress:
            return run(options, folder, progress)
    chosen = {**(_QUICK if options.get("quick") else {}), **options}
    from manyheads.data.texts import read

    from . import runner

    texts = read(options["text"]) if "text" in options else None
    passed = ("strategies", "budgets", "tasks", "lengths", "samples", "rounds", "seed")
    arguments = {name: value for name, value in chosen.items() if name in passed}
    runner.check(**{k: v for k, v in arguments.items() if k in ("strategies", "budgets", "tasks", "lengths")})
    model, tokenizer = _load(options)
    with shown(as_json) as progress:
        return runner.compare(
            model, tokenizer, texts, out=folder, origin=options.get("model", "the shipped model"),
            command=["manyheads", *(a for a in sys.argv[1:] if a != "--debug")], options=options, progress=progress,
            **arguments,
        )  # fmt: skip


def _load(options: dict[str, Any]) -> Any:
    from transformers.utils import logging

    from manyheads import models

    logging.disable_progress_bar()
    device = options.get("device", "cpu")
    if "model" not in options:
        return models.load_default(device)
    model, tokenizer = models.load(options["model"], device)
    if model.config.is_encoder_decoder:
        raise UserError(f"{options['model']} reads with an encoder; give a decoder-only language model")
    return model, tokenizer


def _resumed(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the run in ``folder``; UserError if others are ``given``."""
    from .results import read_run

    options: dict[str, Any] = read_run(folder)["options"]
    if other := [name for name, value in given.items() if options.get(name) != value]:
        raise UserError(
            f"--resume goes on with the options of the run in {folder}; leave --{' and --'.join(other)} away"
        )
    return options


def _show(results: Results, as_json: bool) -> None:
    """Write the report page and print the figures."""
    import json

    from rich.console import Console

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    home = f"{__package__}.train" if results.run.get("kind") == "train" else __package__
    report, summary, table = (import_module(f"{home}.{name}") for name in ("report", "summary", "table"))
    found = summary.summarise(results)
    report.write_report(found)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=2))
    else:
        table.print_summary(found, console)


def _items(values: list[str] | None) -> list[str] | None:
    """The pieces of comma-separated options, None if none was given."""
    return None if values is None else [item.strip() for value in values for item in value.split(",") if item.strip()]


def _specs(values: list[str] | None) -> list[str] | None:
    from ..spec import split_list

    return None if values is None else [spec for value in values for spec in split_list(value)]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"a length is a number of tokens, not {text!r}; write for instance --lengths 1024,2048")
    return int(text)


def _place(path: str) -> str:
    """An existing path made absolute, so that a run can go on from another folder; a hub name as it is."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path
