# SPDX-License-Identifier: Apache-2.0
"""One arm of a task of a field: trained once for each seed, kept in the run's folder, and found there again."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn

from ..errors import UserError
from ..experiment import Arm, RunContext, seeding
from ..recipe import Batch, Procedure, Recipe
from ..spec import parse
from ..training import Checkpoint, Diverged, TrainState, decay, fit, matched_width, optimizers_of
from ..training.budget import Budget
from ..training.matching import parameters_of
from ..training.schedules import Schedule
from . import load as load_task
from .training._trained import arm_folder, read_json, write_json

if TYPE_CHECKING:
    from ._field import FieldTask

__all__ = [
    "FieldModel", "FieldTraining", "Reference", "find_models", "load_model", "recipe_of", "strategy_of", "to_device",
]  # fmt: skip

_RECORD, _WEIGHTS = "training.json", "model.safetensors"
_CURVE = 48  # points of the loss while training that are kept
_SAVED = 60.0  # seconds between two checkpoints


@dataclass(frozen=True, kw_only=True)
class Reference(Recipe):
    """The task's reference model, trained by the task's own loss."""

    kind: str = ""

    def build(self, task: Any, width: int) -> nn.Module:
        made: nn.Module = task.reference(width, self.kind)
        return made


def strategy_of(run: RunContext, arm: Arm) -> Recipe | Procedure:
    """What an arm is: of its spec, the caller's own (``data["strategies"]``), or the reference that its options name.

    Raises:
        UserError: its strategy is no recipe.
    """
    own: Recipe | Procedure | None = run.data.get("strategies", {}).get(arm.key)
    if own is not None:
        return own
    if not arm.spec:
        return Reference(kind=arm.options.get("reference", ""))
    if not isinstance(found := arm.strategy, Recipe | Procedure):
        raise UserError(f"{arm.key} is no recipe of a field: `manyheads show {found.slug}` says what it acts on")
    return found


def recipe_of(run: RunContext, arm: Arm) -> Recipe:
    """What an arm trains.

    Raises:
        UserError: it trains nothing.
    """
    if not isinstance(found := strategy_of(run, arm), Recipe):
        raise UserError(f"{arm.key} is no recipe: it trains nothing")
    return found


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The tensors of a batch on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


@dataclass(frozen=True)
class FieldModel:
    """A trained model of a field, with all that is needed to use it.

    Attributes:
        task: that it was trained on.
        recipe: that it was trained by.
        model: in evaluation mode.
        width: that matched its parameters.
        record: of its training: ``rate``, ``losses``, ``seconds``, ``parameters``, ``validation`` by rate.
    """

    task: FieldTask
    recipe: Recipe
    model: nn.Module
    width: int
    record: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, paths: Sequence[str | Path]) -> list[Any]:
        """What the model says of files of the user's; where ``task.together`` are one sample, of each so many.

        Raises:
            UserError: a file is missing, or none of the kind that the task reads, or too many for whole samples.
        """
        device, many = next(self.model.parameters()).device, self.task.together
        if len(paths) % many:
            raise UserError(
                f"{self.task.name} reads {many} files at a time; give a multiple of {many}, not {len(paths)}"
            )
        if missing := [path for path in paths if not Path(path).exists()]:
            raise UserError(f"{missing[0]} does not exist")
        opened = [self.task.open(Path(p)) for p in paths]
        samples = [self.task.joined(opened[i : i + many]) for i in range(0, len(opened), many)]
        return self.task.said(self.recipe, self.model, samples, device)


@dataclass(frozen=True)
class FieldTraining:
    """The trainings of one arm.

    Attributes:
        task: says how.
        run: in which.
        arm: which.
    """

    task: FieldTask
    run: RunContext
    arm: Arm

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return recipe_of(self.run, self.arm)

    def width(self) -> int:
        """The width at which the arm has as many parameters as all have."""

        def of_baseline() -> int:
            with torch.device("meta"):
                return parameters_of(
                    recipe_of(self.run, self.run.baseline).build(self.task, self.task.width or 2 * self.task.dim)
                )

        def matched() -> int:
            wanted = self.task.parameters or self.run.kept(("field parameters", self.task), of_baseline)
            return matched_width(lambda width: self.recipe.build(self.task, width), wanted, name=self.arm.key)

        return cast(int, self.run.kept(("field width", self.task, self.arm.key), matched))

    def settings(self, seed: int | None = None) -> dict[str, Any]:
        """What a training depends on, in plain values; without a seed, what the choice of the rate does."""
        task = dataclasses.asdict(self.task)
        return {
            "task": self.task.name, "fields": task, "spec": self.arm.full_spec, "options": dict(self.arm.options),
            "own": "" if self.arm.spec or isinstance(self.recipe, Reference) else self.recipe.spec,
            "width": self.width(), "seed": seed, "first": self.run.seeds[0], "run": self.run.seed,
        }  # fmt: skip

    def model(self, seed: int) -> FieldModel:
        """The arm's model of a seed: the one that was kept, or trained now."""
        key = repr(self.settings(seed))
        return cast(FieldModel, self.run.kept_last("field", key, lambda: self._found(seed) or self._fitted(seed)))

    def validation(self) -> dict[float, float]:
        """The task's first metric on the validation part by learning rate, infinitely bad where training diverged."""
        settings = self.settings()
        return cast(dict[float, float], self.run.kept(("rates", repr(settings)), lambda: self._tried(settings)))

    def about(self, trained: FieldModel) -> dict[str, Any]:
        """What is worth keeping of a training in a run's rows."""
        losses, batch = trained.record["losses"], self.task.batch
        points = sorted({round(i * (len(losses) - 1) / (_CURVE - 1)) for i in range(_CURVE)})
        near = max(1, len(losses) // _CURVE)  # a point is the mean of those before it
        curve = [[(i + 1) * batch, mean(losses[max(0, i + 1 - near) : i + 1])] for i in points]
        kept = ("rate", "seconds", "parameters", "validation")
        return {**{name: trained.record[name] for name in kept}, "per": "samples", "curve": curve}

    def _tried(self, settings: Mapping[str, Any]) -> dict[float, float]:
        place = self._place("rates.json")
        if place is not None and (found := read_json(place, settings)) is not None:
            return {rate: math.inf if value is None else value for rate, value in found["validation"]}
        sign = -1 if self.task.metrics[0].higher else 1
        first, found_at, best = self.run.seeds[0], dict.fromkeys(self.task.rates, math.inf), None
        for rate in self.task.rates:
            try:
                made = self.train(first, rate)
            except Diverged:
                continue
            found_at[rate] = sign * self._score(made)
            if best is None or found_at[rate] < found_at[best.record["rate"]]:
                best = made
        if best is None:
            raise UserError(f"{self.arm.key}: training diverges at all rates of {self.task.rates}; give lower ones")
        kept = self._keep(first, best, found_at)
        self.run.kept_last("field tried", repr(self.settings(first)), lambda: kept)
        if place is not None:
            write_json(place, settings, validation=_listed(found_at))
        return found_at

    def _score(self, made: FieldModel) -> float:
        samples = self.task.judged("validation")
        said = self.task.said(made.recipe, made.model, samples, self.run.device)
        name = self.task.metrics[0].name
        return mean(found[name] for found in self.task.scores(samples, said) if name in found)

    def _fitted(self, seed: int) -> FieldModel:
        rates = self.validation()  # of the first seed this has made the model
        best = min(rates, key=lambda rate: (rates[rate], rate))

        def made() -> FieldModel:
            return self._found(seed) or self._keep(seed, self.train(seed, best), rates)

        return cast(FieldModel, self.run.kept_last("field tried", repr(self.settings(seed)), made))

    def train(self, seed: int, rate: float, told: Callable[[TrainState], None] | None = None) -> FieldModel:
        """Train from a seed at a rate; ``told`` of each step."""
        task, run, recipe, width = self.task, self.run, self.recipe, self.width()
        samples, cuda = task.samples("train"), run.device.type == "cuda"
        name = hashlib.sha256(repr((self.settings(seed), rate)).encode()).hexdigest()[:12]
        place = self._place(f"checkpoint-{name}")
        with torch.random.fork_rng(devices=[run.device] if cuda else []):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            model = recipe.build(task, width).to(run.device)
            recipe.start(task, model, _before(self, seed, rate))
            learner = recipe.learner(task, model, width).to(run.device)

            def after(state: TrainState) -> None:
                recipe.after_step(learner, state.progress)
                run.advance(1.0)
                if told is not None:
                    told(state)

            def get_batch(step: int) -> dict[str, Any]:
                return to_device(recipe.batches(task, run.rng(training=seed, step=step), samples), run.device)

            state = fit(
                learner, get_batch, lambda made, batch: recipe.loss(task, made, batch),
                budget=Budget(task.steps, "steps"),
                optimizers=_optimizers(task, recipe, model, learner, rate), schedule=_schedule(), on_step=after,
                checkpoint=None if place is None else Checkpoint(place, every=task.steps, seconds=_SAVED),
            )  # fmt: skip
        record = {
            "rate": rate, "losses": state.losses, "seconds": state.seconds, "parameters": parameters_of(model),
        }  # fmt: skip
        return FieldModel(task, recipe, model, width, record)

    def _place(self, name: str) -> Path | None:
        return None if self.run.folder is None else arm_folder(self.run.folder, self.arm.key) / name

    def _found(self, seed: int) -> FieldModel | None:
        place = self._place(f"seed-{seed}")
        if place is None or read_json(place / _RECORD, self.settings(seed)) is None:
            return None
        return load_model(place, self.run.device, self.recipe)

    def _keep(self, seed: int, made: FieldModel, rates: Mapping[float, float]) -> FieldModel:
        """The record is written last: where it is, the model is whole. Checkpoints have done their work then."""
        made = dataclasses.replace(made, record={**made.record, "validation": _listed(rates)})
        if (place := self._place(f"seed-{seed}")) is not None:
            place.mkdir(parents=True, exist_ok=True)
            save_weights(made.model, str(place / _WEIGHTS))  # weights that two modules share are kept once
            write_json(place / _RECORD, self.settings(seed), **made.record)
            for old in place.parent.glob("checkpoint-*"):
                shutil.rmtree(old, ignore_errors=True)
        return made


def _before(training: FieldTraining, seed: int, rate: float) -> Callable[..., None]:
    """What a recipe trains by before its training starts; the same again where a run goes on."""
    run, decayed = training.run, training.task.weight_decay

    def fitted(module: nn.Module, batches: Any, loss: Any, steps: int) -> None:
        module.to(run.device)
        fit(
            module, lambda step: to_device(batches(run.rng(before=seed, step=step)), run.device), loss,
            budget=Budget(steps, "steps"), optimizers=optimizers_of(module, rate, weight_decay=decayed),
            schedule=_schedule(),
        )  # fmt: skip

    return fitted


def _schedule() -> Schedule:
    return decay("cosine", warmup=0.1, floor=0.02)


def _optimizers(
    task: FieldTask, recipe: Recipe, model: nn.Module, learner: nn.Module, rate: float
) -> list[torch.optim.Optimizer]:
    """Those of what is trained; groups are parted where parameters of the model learn at another rate."""
    made = optimizers_of(learner, rate, weight_decay=task.weight_decay)
    for start, factor in recipe.rate_factors().items():
        slow = {id(p) for name, p in model.named_parameters() if name.startswith(start)}
        for optimizer in made:
            for group in list(optimizer.param_groups):
                if mine := [p for p in group["params"] if id(p) in slow]:
                    group["params"] = [p for p in group["params"] if id(p) not in slow]
                    optimizer.param_groups.append({**group, "params": mine, "lr": factor * group["lr"]})
    return made


def _listed(rates: Mapping[float, float]) -> list[list[float | None]]:
    return [[rate, value if math.isfinite(value) else None] for rate, value in rates.items()]


def load_model(folder: str | Path, device: str | torch.device = "cpu", recipe: Any = None) -> FieldModel:
    """A model that ``manyheads train`` kept; ``recipe`` where it is the caller's own.

    Raises:
        UserError: there is none in the folder; the message names those below it.
    """
    import json

    place = Path(folder)
    try:
        record = json.loads((place / _RECORD).read_text("utf-8"))
        settings = record.pop("settings")
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in settings["fields"].items()}
        made: Any = load_task(settings["task"])(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        below = find_models(place)
        hint = f"give one of its models, {', '.join(below[:3])}" if below else "give what `manyheads train` wrote"
        raise UserError(f"{folder} holds no trained model of a field: {hint}") from error
    kind = settings["options"].get("reference", "")
    if recipe is None and settings["own"]:
        raise UserError(f"{folder} was trained by {settings['own']} of your own: manyheads.load(folder, recipe=...)")
    recipe = recipe or (parse(settings["spec"]) if settings["spec"] else Reference(kind=kind))
    model = recipe.build(made, settings["width"]).to(device)
    load_weights(model, str(place / _WEIGHTS), device=str(device))
    return FieldModel(made, recipe, model.eval(), settings["width"], record)


def find_models(folder: Path) -> list[str]:
    """Folders of the models of a run, sorted."""
    return sorted(str(found.parent) for found in folder.glob(f"models/*/seed-*/{_RECORD}"))
