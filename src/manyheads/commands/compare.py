# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads compare`` and ``manyheads report``. What they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads import comparison
from manyheads.errors import UserError
from manyheads.progress import shown

from .options import (
    Device,
    Dtype,
    Json,
    Out,
    Protect,
    Quick,
    RayAddress,
    Resume,
    Samples,
    Seed,
    TextFiles,
    Workers,
    console,
    executor,
    passive_threads,
    print_json,
    quiet_libraries,
    resumed,
    typed,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from manyheads.experiment import Results
    from manyheads.experiment.executors import Executor

_QUICK: dict[str, Any] = {"budgets": ["0.25"], "samples": 3, "rounds": 1}
_QUICK_LENGTHS = [512]
_OF_TEXT = ("lengths", "text")  # options that a pipeline has no use for


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))  # spaces, where a narrow terminal can break the line


def compare(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a causal LM, or a pipeline of diffusers: its folder, or scenes, unet, moving. "
            "\\[default: the shipped language model]"
        ),
    ] = None,
    text: TextFiles = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            help="Specs such as snapkv or snapkv:window_size=16,kernel_size=5; several that act together joined by +. "
            f"\\[default: {_listed(comparison.STRATEGIES)}]"
        ),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(help=f"Fractions of the tokens (0.25) or slots (128). \\[default: {_listed(comparison.BUDGETS)}]"),
    ] = None,
    protect: Protect = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of a language model some of {_listed(comparison.TASKS['causal_lm'])}; of a pipeline "
            f"{_listed(comparison.TASKS['pipeline'])} and any other task on images; with --train any that trains, as "
            "sequence_classification:data=fsdd,length=4096,stride=16."
        ),
    ] = None,
    lengths: Annotated[
        list[str] | None, typer.Option(help=f"Tokens of a context. \\[default: {_listed(comparison.LENGTHS)}]")
    ] = None,
    samples: Samples = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    workers: Workers = None,
    ray: RayAddress = None,
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
    ranking: Annotated[
        str | None,
        typer.Option(
            help="With --train: rank the documents of this collection in place of modelling text: cranfield, or a "
            "folder with corpus.jsonl, queries.jsonl and qrels.tsv. --model is then an encoder to rank beside."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare strategies on a model and text, or on a pipeline: quality, memory and speed, each with its uncertainty.

    Without options: the shipped model reads the source of Python's standard library, in about a minute on two cores.
    With --train: small models are trained from scratch, one token mixer each, all on one budget.
    The results go to a folder with a report page. A run that was cut off goes on when it is given the same options and
    --out, or with --resume.
    """
    given: dict[str, Any] = {
        "model": model and _place(model),
        "text": text and [_place(path) for path in text],
        "strategies": _specs(strategies),
        "budgets": _items(budgets),
        "protect": protect,
        "tasks": _specs(tasks),
        "lengths": [_whole(length) for length in _items(lengths) or []] or None,
        "samples": samples,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "quick": quick or None,
        "train": train or None,
        "budget": budget,
        "minutes": minutes,
        "seeds": seeds,
        "ranking": ranking and _place(ranking),
    }
    options = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        options, out = resumed(resume, out, options, ("compare", "train"), "compare")
    _refuse(options)
    where = executor(workers, ray)
    passive_threads()
    show_results(_results(options, out, where, as_json), as_json)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `manyheads compare` wrote.")],
    as_json: Json = False,
) -> None:
    """Build the report page of a run again from its rows, and print the table."""
    from manyheads.experiment import Results

    show_results(Results.read(folder), as_json)


def _results(options: dict[str, Any], out: Path | None, where: Executor | None, as_json: bool) -> Results:
    """Check everything that can be checked without a model, then compare; a run that is finished is read."""
    from manyheads.data.texts import read
    from manyheads.experiment import Results
    from manyheads.experiment.journal import folder_for

    folder, finished = folder_for(out, options)
    if finished:
        return Results.read(folder)
    work, arguments = (_training if options.get("train") else _comparison)(options)
    texts = read(options["text"]) if "text" in options else None
    quiet_libraries()
    with shown(as_json) as progress:
        return work(
            texts=texts, out=folder, command=typed(), options=options, progress=progress, executor=where,
            device=options.get("device", "cpu"), seed=options.get("seed", 0), **arguments,
        )  # fmt: skip


def _comparison(options: dict[str, Any]) -> tuple[Callable[..., Results], dict[str, Any]]:
    """What compares strategies on the model that ``options`` name, and with which arguments."""
    from manyheads.experiment import CausalLM
    from manyheads.experiment.subjects import subject as subject_of
    from manyheads.spec import protecting

    subject = subject_of(options.get("model", "default"), options.get("dtype"))
    of_text = isinstance(subject, CausalLM)
    if not of_text and (wrong := [name for name in _OF_TEXT if name in options]):
        raise UserError(f"{subject.name} reads no text: leave --{wrong[0]} away")
    quick = _QUICK | ({"lengths": _QUICK_LENGTHS} if of_text else {}) if options.get("quick") else {}
    if not of_text and "strategies" not in options:
        category = "tokens" if subject.kind == "vision" else "diffusion"
        raise UserError(f"say which --strategies to compare on {subject.name}: `manyheads list --category {category}`")
    chosen = {**quick, **options}
    if "protect" in options:
        chosen["strategies"] = [
            spec if spec == "full" else protecting(spec, options["protect"])
            for spec in chosen.get("strategies", comparison.STRATEGIES)
        ]
    passed = ("strategies", "budgets", "tasks", "lengths", "samples", "rounds")
    arguments = {"subject": subject} | {name: value for name, value in chosen.items() if name in passed}
    comparison.plan(**arguments)
    return comparison.compare, arguments


def _training(options: dict[str, Any]) -> tuple[Callable[..., Results], dict[str, Any]]:
    """What trains a model for each mixer and compares them, and with which arguments."""
    if "ranking" in options:
        from manyheads.comparison_rank import compare_rankers, plan_ranking

        found = {name: options[name] for name in ("model", "seeds", "quick", "strategies") if name in options}
        plan_ranking(options["ranking"], **found)
        return _ranking(compare_rankers), found | {"given": options["ranking"]}
    from manyheads.comparison_train import compare_on, compare_trained

    if "tasks" in options:
        given = {name: options[name] for name in ("seeds", "samples", "tasks") if name in options}
        return compare_on, given | {"strategies": options.get("strategies", [])}
    passed = ("budget", "minutes", "seeds", "samples", "quick", "strategies")
    arguments = {name: options[name] for name in passed if name in options}
    return compare_trained, arguments | {"length": options.get("lengths", [None])[0]}


def _ranking(compare_rankers: Callable[..., Results]) -> Callable[..., Results]:
    """It reads a collection, and no texts."""
    return lambda texts=None, **given: compare_rankers(**given)


def show_results(results: Results, as_json: bool) -> None:
    """Write the report page and print the figures."""
    from manyheads.report.compare import page, print_summary
    from manyheads.report.page import write
    from manyheads.report.summary import Summary

    summary = Summary(results)
    write(page(summary), results.report)
    if as_json:
        print_json(summary.document())
    else:
        print_summary(summary, console(200))


_TRAINING = ("budget", "minutes", "seeds", "ranking")  # options that go with --train alone
_NO_TRAINING = {
    "model": "it makes its own models", "dtype": "it trains in float32, on a GPU in bfloat16",
    "budgets": "a training has one --budget, in tokens",
    "protect": "it compresses no cache",
}  # fmt: skip
_NO_TASKS = ("budget", "minutes", "lengths", "quick")  # options that a task's own fields stand for

_NO_RANKING = ("text", "dtype", "budgets", "budget", "minutes", "tasks", "lengths", "samples")


def _refuse(options: dict[str, Any]) -> None:
    """Raise the UserError of an option that does not go with, or without, ``--train``."""
    if not options.get("train"):
        if wrong := [name for name in _TRAINING if name in options]:
            raise UserError(f"--{wrong[0]} goes with --train, which trains a model for each strategy; add it")
        return
    if "ranking" in options:
        if wrong := [name for name in _NO_RANKING if name in options]:
            raise UserError(f"--{wrong[0]} does not go with --ranking, which has texts and a size of its own")
        return
    if wrong := [name for name in _NO_TRAINING if name in options]:
        raise UserError(f"--{wrong[0]} does not go with --train: {_NO_TRAINING[wrong[0]]}")
    if "tasks" in options and (wrong := [name for name in _NO_TASKS if name in options]):
        raise UserError(f"--{wrong[0]} does not go with --tasks: write its size behind its name, as name:steps=300")
    if "budget" in options and "minutes" in options:
        raise UserError("give --budget or --minutes, not both")
    if len(options.get("lengths", [0])) != 1:
        raise UserError("--train has one training length; write for instance --lengths 256")


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
