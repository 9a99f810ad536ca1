# SPDX-License-Identifier: Apache-2.0
"""``manyheads train``: papers of a field and their task's reference model, trained alike and compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalog
from .errors import UserError
from .experiment.arms import Arm
from .experiment.design import Experiment, Planned
from .experiment.journal import FOLDER, RUN, Results, read_run
from .recipe import Procedure, Recipe
from .spec import parse, told_by_spec
from .strategy import Strategy

if TYPE_CHECKING:
    from .experiment.executors import Executor
    from .experiment.task import Task
    from .progress import Progress
    from .tasks._field import FieldTask

__all__ = ["load", "plan_field", "train"]

_JUDGING = 0.85  # of the minutes are for training; judging takes the rest
_TIMED = 4  # steps that an arm's speed is taken from


def load(what: str | Path, device: str = "cpu", recipe: Recipe | None = None) -> Any:
    """The strategy of a slug as a class, or the trained model in a folder that ``manyheads train`` wrote.

    ``recipe`` is asked for where the model was trained by one of the caller's own.

    Raises:
        UserError: unknown slug, or a folder without a model.
    """
    place = Path(what).expanduser()
    if isinstance(what, Path) or place.is_absolute() or "/" in what or (place / "training.json").is_file():
        from .tasks._field_training import load_model

        return load_model(place, device, recipe)
    return catalog.load(what)


def plan_field(
    strategies: Iterable[str | Strategy], task: str | None = None, folder: str | Path | None = None,
    seeds: int | None = None, steps: int | None = None,
) -> Experiment:  # fmt: skip
    """The experiment of :func:`train`; trains nothing.

    Args:
        strategies: recipes or procedures of one field, or their specs; also of the caller's own.
        task: with fields, as ``digit_strings:digits=3``; the first strategy's own when None.
        folder: of the user's own data; the task's public data when None.
        seeds: trainings of each arm; 3 when None.
        steps: of each training; the task's when None.

    Raises:
        UserError: a strategy or a task that is none of a field, or data that cannot be had.
    """
    from .tasks import given
    from .tasks._field import FieldTask

    made = [parse(spec) for spec in strategies]
    if not made:
        raise UserError("say which papers to train: `manyheads list --category domains` shows them")
    for strategy in made:
        if not isinstance(strategy, Recipe | Procedure):
            raise UserError(f"{strategy.slug} is no recipe of a field: `manyheads show {strategy.slug}` says its use")
    first: Any = made[0]
    on, _ = given(task or first.task)
    if on.procedures and all(isinstance(one, Procedure) for one in made):
        if folder or steps:
            raise UserError(f"nothing is trained on {on.name}: leave --data and --budget away")
        return _plan_procedures(made, on)
    if not isinstance(on, FieldTask):
        raise UserError(f"{on.name} is no task of a field: `manyheads tasks --field {_field(first.task)}` shows those")
    for strategy in made:
        if _field(strategy.task) != _field(on.name):  # type: ignore[attr-defined]
            raise UserError(f"{strategy.slug} is of the field {_field(strategy.task)}, {on.name} is not")  # type: ignore[attr-defined]
    place = str(Path(folder).expanduser().resolve()) if folder else on.folder
    on = dataclasses.replace(on, folder=place, steps=steps or on.steps)
    on.samples("train")  # what cannot be had is found now
    base = Arm(on.references[0], options={"reference": on.references[0]})
    arms = tuple({one.spec: Arm(one.spec, one.spec if told_by_spec(one) else "") for one in made}.values())
    return Experiment(
        subject="trainable", arms=arms, baseline=base, tasks=(on,), equal="parameters", seeds=seeds or 3
    )  # fmt: skip


def _plan_procedures(made: Sequence[Any], on: Task) -> Experiment:
    """The experiment of procedures where nothing is trained: the first one is what others are compared with."""
    for one in made:
        if _field(one.task) != _field(on.name):
            raise UserError(f"{one.slug} is of the field {_field(one.task)}, {on.name} is not")
    base, *arms = {one.spec: Arm(one.spec, one.spec if told_by_spec(one) else "") for one in made}.values()
    return Experiment(subject="trainable", arms=tuple(arms), baseline=base, tasks=(on,))


def _field(task: str) -> str:
    from .tasks import field_of

    return field_of(task)


def train(
    strategies: Iterable[str | Strategy], task: str | None = None, *, data: str | Path | None = None,
    seeds: int | None = None, budget: str | int | None = None, seed: int = 0, device: str = "cpu",
    out: str | Path = FOLDER, command: Sequence[str] = (), progress: Progress | None = None,
    options: Mapping[str, Any] | None = None, executor: Executor | None = None,
) -> Results:  # fmt: skip
    """Train papers of a field beside the task's reference model, judge all on groups that none has seen.

        results = manyheads.train(["branchformer"], budget="10m")
        model = manyheads.load(results.folder / "models" / "branchformer" / "seed-0")
        model.predict(["mine.wav"])

    All arms have the same number of parameters within 2 %, the same draws, the same learning rates tried. A run that
    was cut off goes on when it is called again with the same settings.

    Args:
        strategies, task, seeds: see :func:`plan_field`.
        data: folder of one's own data, as the task takes it.
        budget: of every training in samples (``20k``) or steps (``'700 steps'``), or of all together in time
            (``10m``), by their speed on this machine; the task's own number of steps when None.
        seed: of all draws.
        device: ``cpu`` or ``cuda``.
        out: folder of results and models.
        command, options: to keep in ``run.json``.
        progress: is told how far the run is.
        executor: where units run; this process when None.

    Raises:
        UserError: anything that the caller can mend, before any training.
    """
    from .experiment.runner import run
    from .training.budget import Budget

    specs, steps = [parse(one) for one in strategies], None
    own = {"strategies": {one.spec: one for one in specs if not told_by_spec(one)}}
    plan = plan_field(specs, task, data, seeds)
    if budget is not None:
        if plan.tasks[0].procedures:
            raise UserError(f"nothing is trained on {plan.tasks[0].name}: leave --budget away")
        given, batch = Budget.of(budget), plan.tasks[0].batch  # type: ignore[attr-defined]
        if given.unit == "seconds":
            steps = _earlier_steps(Path(out), options)
            steps = steps or _affordable(plan.at("cpu"), given.amount, seed, device, own)
        else:
            steps = max(1, int(given.amount) // (1 if given.unit == "steps" else batch))
    about = {"command": list(command), "options": dict(options or {}), "kind": "field"}
    return run(
        plan_field(specs, task, data, seeds, steps).at("cpu"), out, seed=seed, device=device, data=own,
        executor=executor, progress=progress, about=about,
    )  # fmt: skip


def _affordable(plan: Planned, seconds: float, seed: int, device: str, own: Mapping[str, Any] | None = None) -> int:
    """Steps of every training with which all together take so long on this machine."""
    from .experiment.runner import context
    from .tasks._field_training import FieldTraining, strategy_of
    from .training import TrainState

    made, total = context(plan, seed, device, own), 0.0
    planned: Any = plan.tasks[0]
    task: FieldTask = dataclasses.replace(planned, steps=_TIMED)
    for arm in plan.arms:
        if isinstance(strategy_of(made, arm), Procedure):
            continue
        stamps: list[float] = []

        def stamp(state: TrainState, stamps: list[float] = stamps) -> None:
            made.synchronise()
            stamps.append(time.perf_counter())

        FieldTraining(task, made, arm).train(0, task.rates[0], stamp)
        total += min(after - before for before, after in pairwise(stamps))
    trainings = len(plan.seeds) + len(task.rates) - 1
    return max(1, int(float(f"{_JUDGING * seconds / (total * trainings):.2g}")))


def _earlier_steps(out: Path, options: Mapping[str, Any] | None) -> int | None:
    """Steps of an unfinished run with these options in the folder: what is left of it must not have others."""
    if not (out / RUN).exists():
        return None
    run = read_run(out)
    (task,) = run["experiment"]["tasks"].values()
    return int(task["steps"]) if run["options"] == dict(options or {}) else None
