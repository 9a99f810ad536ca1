# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train a decoder under every arm: equal terms, one choice of the learning rate, kept models.

Arms differ in their mixer only: decoders of one number of parameters (within 2 %), the same first weights' seed, the
same batches in the same order, the same learning rates tried on the first seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ... import catalog
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...models.decoder import Decoder, DecoderConfig, TokenModel
from ...training import BatchFn, Diverged, next_token_loss, train_lm
from ._decoders import check_causal, mixer_of, model_of, perturb_zero_params
from ._trained import Trained, arm_folder, read_json, read_trained, write_json, write_trained

__all__ = ["TRAINING_METRICS", "Training", "TrainingTask", "at_once", "best_rate"]

TRAINING_METRICS = (
    Metric("tuning_nll", "loss on what is set aside for tuning, nats/token", "nats/token"),
    Metric("training_nll", "loss in the last tenth of training, nats/token", "nats/token"),
    Metric("temperature", "temperature that a calibration found for the greatest length"),
)
_CURVE = 32  # points of the loss while training that are kept
_AT_ONCE = 16384  # tokens judged at once


def at_once(length: int) -> int:
    """Sequences of ``length`` that are judged at once."""
    return max(1, _AT_ONCE // length)


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the least loss, the lower of two equals.

    Raises:
        UserError: the loss is finite at none.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise UserError(f"training diverges at all rates of {', '.join(map(str, losses))}; give lower ones")
    return min(finite, key=lambda rate: (finite[rate], rate))


@dataclass(frozen=True, kw_only=True)
class TrainingTask(Task):
    """Base of tasks that train.

    A unit trains one arm from one seed, or reads the model that another unit has kept in the run's folder under the
    same settings, and judges it. A unit that finds no rates there tunes them itself. ``options`` of an arm:
    ``optimizer`` (``adamw`` or ``muon``); ``weights_of``, the name of an arm whose trained weights it is judged with
    under a strategy of its own; ``calibrated`` and ``align``, a strategy that is calibrated on the trained model, how.

    Attributes:
        dim, layers, heads: of every decoder.
        parameters: of every decoder; 0 for as many as the baseline's has with an ordinary feed-forward width.
        length: tokens of a training sequence.
        batch: sequences of a step.
        steps: of a training.
        tune_steps: of a training that only chooses the learning rate; 0 for ``steps``, and the best of them is then the
            first seed's.
        rates: learning rates that every arm tries.
        trainings: seeds that are trained of the run's; 0 for all.
        times: multiples of ``length`` at which models are judged.
        samples: sequences that are judged.
        only: names of the arms that are trained; all when empty.
        tuned_by: task whose choice of the learning rate is taken; None to tune by this one.
    """

    subject: ClassVar[str] = "trainable"
    reports: ClassVar[bool] = True  # whether what is known of the training is in this task's rows
    stored: ClassVar[str] = ""  # what the folder of a model begins with
    kind: ClassVar[type[TokenModel]] = Decoder  # what is trained

    dim: int = 64
    layers: int = 3
    heads: int = 2
    parameters: int = 0
    length: int = 64
    batch: int = 16
    steps: int = 400
    tune_steps: int = 0
    rates: tuple[float, ...] = (2e-3, 6e-3)
    trainings: int = 0
    times: tuple[int, ...] = (1,)
    samples: int = 64
    only: tuple[str, ...] = ()
    tuned_by: TrainingTask | None = None

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise UserError("rates are learning rates: give one or more, above 0")
        if min(self.steps, self.samples, self.batch) < 1:
            raise UserError("steps, samples and batches count: give 1 or more")

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Tokens that there are."""

    @abstractmethod
    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        """Batches of a training on the CPU, ``ids`` and a second tensor as the loss wants them; alike for all arms."""

    @abstractmethod
    def validation(self, run: RunContext, model: TokenModel) -> float:
        """Loss of a model on what is set aside for tuning."""

    @abstractmethod
    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        """Rows of a trained model, without gradients."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of a model on a batch."""
        return next_token_loss(model, batch)

    def check(self, model: TokenModel, ids: Tensor, name: str) -> None:
        """Refuse, by UserError, a model whose loss on ``ids [2, T]`` would mean nothing."""
        check_causal(model, ids, name)

    def calibrating(self, run: RunContext) -> Tensor:
        """Sequences to calibrate a strategy on, ``ids [B, times[-1] * length]``, on the run's device."""
        raise UserError(f"{self.name} has nothing to calibrate on")

    @property
    def config(self) -> DecoderConfig:
        """Of a decoder, before its feed-forward width is fitted."""
        return DecoderConfig(self.vocab, self.dim, self.layers, self.heads, length=self.length)

    def trained_arms(self, run: RunContext) -> list[Arm]:
        """Arms that have a training of their own here."""
        arms = [arm for arm in run.arms if "weights_of" not in arm.options]
        return [arm for arm in arms if not self.only or arm.name in self.only]

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for seed in run.seeds[: self.trainings or None]:
            for arm in self.trained_arms(run):
                runs = 1.0
                if seed == run.seeds[0] and self.tuned_by is None and len(self.rates) > 1:
                    runs = len(self.rates) * (self.tune_steps or self.steps) / self.steps + (self.tune_steps > 0)
                cost = runs * self.steps * self.batch * self.length if self.reports else 1.0
                label = f"{arm.key}: {self.name.replace('_', ' ')}, training {seed + 1}"
                found.append(WorkUnit(self.key, f"{arm.key}/{seed}", cost, label, {"arm": arm.key, "seed": seed}))
        return found

    def guard(self, run: RunContext) -> None:
        """Refuse an arm that sees what it is asked for before any is trained."""
        ids = self.batches(run, run.seeds[0])(0)[0][:2, : self.length]
        for arm in self.trained_arms(run):
            model = model_of(self.kind, run, arm, self.config, self.parameters, run.seeds[0])
            perturb_zero_params(model)
            self.check(model, ids.to(run.device), arm.key)

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        training = Training(self, run, arm)
        trained = training.model(seed)
        ids = self.batches(run, seed)(0)[0][:2, : self.length].to(run.device)
        self.check(trained.model, ids, arm.key)  # again: training may open a path that was shut
        if self.reports:
            yield from _training_rows(training, seed, trained)
        for judged in (arm, *(other for other in run.arms if other.options.get("weights_of") == arm.name)):
            with torch.no_grad(), _under(self, run, judged, trained.model) as (model, temperature):
                found = list(self.rows(run, judged, seed, model))
            yield from found
            if temperature is not None and self.reports:
                yield self.row("temperature", judged, temperature, "calibration", seed=seed)

    def training_fields(self) -> Sequence[str]:
        """Names of further fields that a training depends on."""
        return ()


@dataclass(frozen=True)
class Training:
    """The trainings of one arm for a task.

    Attributes:
        task: says how.
        run: in which.
        arm: which.
    """

    task: TrainingTask
    run: RunContext
    arm: Arm

    def settings(self, seed: int | None = None) -> dict[str, Any]:
        """What a training depends on, in plain values; without a seed, what the tuning does."""
        names = ("vocab", "dim", "layers", "heads", "parameters", "length", "batch", "steps", "tune_steps", "rates")
        found = {name: getattr(self.task, name) for name in (*names, *self.task.training_fields())}
        tuned = None if (tuning := self._tuning()) is None else tuning.settings()
        own = {"spec": mixer_of(self.run, self.arm).spec, "optimizer": self.arm.options.get("optimizer", "adamw")}
        return {**found, **own, "seed": seed, "first": self.run.seeds[0], "run": self.run.seed, "tuned_by": tuned}

    def _tuning(self) -> Training | None:
        """The trainings of the other task that chooses the rate."""
        return None if self.task.tuned_by is None else Training(self.task.tuned_by, self.run, self.arm)

    def tuned(self) -> dict[float, float]:
        """Loss on what is set aside by learning rate, infinite where training diverged; nothing for a single rate."""
        if (tuning := self._tuning()) is not None:
            return tuning.tuned()
        if len(self.task.rates) == 1:
            return {}
        settings = self.settings()
        return cast(dict[float, float], self.run.kept(("tuned", repr(settings)), lambda: self._tuned(settings)))

    def _tuned(self, settings: dict[str, Any]) -> dict[float, float]:
        place = None if self.run.folder is None else self._place("tuning.json")
        if place is not None and (found := read_json(place, settings)) is not None:
            return {rate: math.inf if loss is None else loss for rate, loss in found["losses"]}
        first, losses, best = self.run.seeds[0], dict.fromkeys(self.task.rates, math.inf), None
        for rate in losses:
            try:
                trained = self._train(first, rate, self.task.tune_steps or self.task.steps)
            except Diverged:
                continue
            losses[rate] = self.task.validation(self.run, trained.model)
            if math.isfinite(losses[rate]) and best_rate(losses) == rate:
                best = trained
        best_rate(losses)  # refuses rates of which none will do
        if place is not None:
            write_json(place, settings, losses=[[r, x if math.isfinite(x) else None] for r, x in losses.items()])
        if best is not None and not self.task.tune_steps:
            self._keep(first, best)
        return losses

    def model(self, seed: int) -> Trained:
        """The arm's model of a seed: the one that was kept, or trained now."""
        key = repr(self.settings(seed))
        return cast(Trained, self.run.kept_last("trained", key, lambda: self._found(seed) or self._fitted(seed)))

    def _fitted(self, seed: int) -> Trained:
        """Train at the chosen rate, or at the next lower one where the longer training diverges."""
        losses = self.tuned() or dict.fromkeys(self.task.rates, 0.0)
        found = self._found(seed)  # tuning may have made it
        best = best_rate(losses)
        for rate in sorted((rate for rate in losses if rate <= best), reverse=True):
            if found is not None:
                return found
            try:
                found = self._train(seed, rate, self.task.steps)
            except Diverged:
                continue
            self._keep(seed, found)
            return found
        raise UserError(f"{self.arm.key}: training diverges at every rate up to {best:g}; give lower ones")

    def _train(self, seed: int, rate: float, steps: int) -> Trained:
        task = self.task
        model = model_of(task.kind, self.run, self.arm, task.config, self.task.parameters, seed)
        draw, order = self.task.batches(self.run, seed), hashlib.sha256()

        def get_batch(step: int) -> tuple[Tensor, Tensor | None]:
            ids, loss_mask = draw(step)
            order.update(ids.numpy().tobytes())
            return ids.to(self.run.device), None if loss_mask is None else loss_mask.to(self.run.device)

        state = train_lm(
            model, get_batch, steps, lr=rate, optimizer=self.arm.options.get("optimizer", "adamw"), loss=task.loss,
            on_step=lambda _: self.run.advance(self.task.batch * self.task.length),
        )  # fmt: skip
        return Trained(model, rate, state.losses, state.seconds, order.hexdigest()[:16])

    def _place(self, name: str) -> Path:
        return arm_folder(self.run.folder, self.arm.key) / f"{self.task.stored}{name}"

    def _found(self, seed: int) -> Trained | None:
        if self.run.folder is None:
            return None

        def build(hidden: int) -> TokenModel:
            config = dataclasses.replace(self.task.config, hidden=hidden)
            return self.task.kind(mixer_of(self.run, self.arm), config).to(self.run.device)

        return read_trained(self._place(f"seed-{seed}"), self.settings(seed), build)

    def _keep(self, seed: int, trained: Trained) -> None:
        if self.run.folder is not None:
            write_trained(self._place(f"seed-{seed}"), self.settings(seed), trained)


@contextmanager
def _under(
    task: TrainingTask, run: RunContext, arm: Arm, model: TokenModel
) -> Iterator[tuple[TokenModel, float | None]]:
    """The trained model as the arm has it judged; of a calibrated one, the temperature at the greatest length."""
    if "weights_of" in arm.options:
        other = task.kind(mixer_of(run, arm), model.config)
        other.load_state_dict(model.state_dict())
        model = other.to(run.device).eval()
    if "calibrated" not in arm.options:
        yield model, None
        return
    lengths = [times * task.length for times in sorted(task.times) if times > 1]
    strategy: Any = catalog.load(arm.options["calibrated"])
    ids = task.calibrating(run)
    made = strategy.calibrated(model, ids, lengths, trained=task.length, align=arm.options["align"])
    with made.on(model):
        yield model, float(made.temperature(0, torch.tensor([[[max(lengths, default=task.length)]]])).mean())


def _training_rows(training: Training, seed: int, trained: Trained) -> Iterator[Row]:
    task, run, arm = training.task, training.run, training.arm
    losses, step = trained.losses, task.batch * task.length
    tail = losses[-max(1, len(losses) // 10) :]
    points = sorted({round(i * (len(losses) - 1) / (_CURVE - 1)) for i in range(_CURVE)})
    about = {
        "rate": trained.rate, "tokens": len(losses) * step, "seconds": trained.seconds, "order": trained.order,
        "parameters": trained.model.parameters_held, "curve": [[(i + 1) * step, losses[i]] for i in points],
    }  # fmt: skip
    yield task.row("training_nll", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
    if seed != run.seeds[0] or task.tuned_by is not None:
        return
    for rate, loss in training.tuned().items():
        value = loss if math.isfinite(loss) else math.log(task.vocab)  # as bad as knowing nothing
        more = {"diverged": not math.isfinite(loss)}
        yield task.row("tuning_nll", arm, value, "tuning", seed=seed, at={"rate": rate}, about=more)
