# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads train`` and ``manyheads predict``. What they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads.progress import shown
from manyheads.report.table import Column, Table, print_table

from .options import (
    Device,
    Json,
    Out,
    RayAddress,
    Resume,
    Seed,
    Workers,
    console,
    executor,
    passive_threads,
    print_json,
    quiet_libraries,
    resumed,
    typed,
)  # fmt: skip


def train(
    strategies: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPEC]...", help="Papers of a field, as branchformer or branchformer:merge=learned."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task of that field, also with fields: digit_strings:digits=3. \\[default: the paper's]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of your own data; `manyheads tasks --json` says what it holds.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of each arm. \\[default: 3]")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Samples (20k) or steps ('700 steps') of each training, or time of all (10m). "
                     "\\[default: the task's]"),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    workers: Workers = None,
    ray: RayAddress = None,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train papers of a field beside the reference model of their task: one budget, equal parameters, unseen groups.

    Ends in the table and page of `manyheads compare`, and keeps the models: `manyheads predict FOLDER FILE`. A run that
    was cut off goes on when it is given the same options and --out, or with --resume.
    """
    from manyheads.spec import split_list

    named = [spec for text in strategies or () for spec in split_list(text)]
    given: dict[str, Any] = {
        "strategies": named or None, "task": task, "data": data and str(data.expanduser().resolve()), "seeds": seeds,
        "budget": budget, "seed": seed, "device": device,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        options, out = resumed(resume, out, options, ("field",), "train")
    _show(_results(options, out, executor(workers, ray), as_json), as_json)


def predict(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a model: RUN/models/ARM/seed-0.")],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Files as the model's task reads them; pairs one after the other."),
    ],
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder for images with what is said drawn on them, of tasks that see images."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say what a model that `manyheads train` kept makes of your own files."""
    passive_threads()
    from manyheads.comparison_field import load

    quiet_libraries()
    model = load(folder, device or "cpu")
    found = model.predict(paths)
    many = model.task.together
    if pictures is not None:
        _illustrate(model.task, paths[::many], found, pictures)
    said = [str(one) for one in found]
    files = [" ".join(map(str, paths[i : i + many])) for i in range(0, len(paths), many)]
    if as_json:
        print_json([{"file": file, "said": one} for file, one in zip(files, said, strict=True)])
        return
    rows = [[file, one or "nothing"] for file, one in zip(files, said, strict=True)]
    title = f"{model.recipe.spec if model.recipe.slug != '_field_training' else 'reference'} on {model.task.name}"
    print_table(Table([Column("file", text=True), Column("said", text=True)], rows, title), console(120))


def _illustrate(task: Any, paths: list[Path], said: list[Any], folder: Path) -> None:
    """``NAME.png`` of each file in the folder; of files of one name the later ones have a number."""
    from manyheads.errors import UserError

    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for path, one in zip(paths, said, strict=True):
        if (image := task.illustrated(path, one)) is None:
            raise UserError(f"{task.name} draws nothing on its files: leave out --pictures")
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        image.save(folder / f"{name}.png")


def _results(options: dict[str, Any], out: Path | None, where: Any, as_json: bool) -> Any:
    """Check everything that can be checked without training, then train; a run that is finished is read."""
    from manyheads.experiment import Results
    from manyheads.experiment.journal import folder_for

    folder, finished = folder_for(out, options)
    if finished:
        return Results.read(folder)
    passive_threads()
    from manyheads import comparison_field

    quiet_libraries()
    arguments = {name: value for name, value in options.items() if name != "strategies"}
    with shown(as_json) as progress:
        return comparison_field.train(
            options.get("strategies", ()), out=folder, command=typed(), options=options, progress=progress,
            executor=where, **arguments,
        )  # fmt: skip


def _show(results: Any, as_json: bool) -> None:
    """As `manyheads compare`, and where the models are."""
    from manyheads.tasks._field_training import find_models

    from .compare import show_results

    show_results(results, as_json)
    if not as_json and (kept := find_models(results.folder)):
        console().print(f"models: {', '.join(kept[:4])}{' ...' if len(kept) > 4 else ''}", markup=False, soft_wrap=True)
