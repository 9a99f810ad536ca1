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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ... import catalog
from ...errors import UserError
from ...experiment import seeding
from ...experiment.arms import Arm
from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext, Task
from ...models.decoder import Decoder, DecoderConfig
from ...training import BatchFn, Diverged, best_rate, choose_rate, train_lm
from ._arms import decoder_of, mixer_of
from ._causal import check_causal, perturb_zero_params
from ._trained import Trained, arm_folder, read_json, read_trained, write_json, write_trained

__all__ = ["TRAINING_METRICS", "TrainingTask", "at_once"]

TRAINING_METRICS = (
    Metric("tuning_nll", "loss on what is set aside for tuning, nats/token", "nats/token"),
    Metric("training_nll", "loss in the last tenth of training, nats/token", "nats/token"),
)
_CURVE = 32  # points of the loss while training that are kept
_AT_ONCE = 16384  # tokens judged at once


def at_once(length: int) -> int:
    """Sequences of ``length`` that are judged at once."""
    return max(1, _AT_ONCE // length)


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
        """Batches of a training on the CPU, ``ids [B, T + 1]`` and which predictions count; the same for all arms."""

    @abstractmethod
    def validation(self, run: RunContext, model: Decoder) -> float:
        """Loss of a model on what is set aside for tuning."""

    @abstractmethod
    def rows(self, run: RunContext, arm: Arm, seed: int, model: Decoder) -> Iterator[Row]:
        """Rows of a trained model, without gradients."""

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

    def seeds(self, run: RunContext) -> tuple[int, ...]:
        """Seeds that are trained."""
        return run.seeds[: self.trainings or None]

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for seed in self.seeds(run):
            for arm in self.trained_arms(run):
                runs = 1.0
                if seed == run.seeds[0] and self.tuned_by is None and len(self.rates) > 1:
                    runs = len(self.rates) * (self.tune_steps or self.steps) / self.steps + (self.tune_steps > 0)
                cost = runs * self.steps * self.batch * self.length if self.reports else 1.0
                label = f"{arm.key}: {self.name.replace('_', ' ')}, training {seed + 1}"
                found.append(WorkUnit(self.key, f"{arm.key}/{seed}", cost, label, {"arm": arm.key, "seed": seed}))
        return found

    def guard(self, run: RunContext) -> None:
        """Refuse an arm that sees the future before any is trained."""
        ids = torch.randint(self.vocab, (2, self.length), generator=seeding.torch_generator(run.seed, guard=self.name))
        for arm in self.trained_arms(run):
            model = self.build(run, arm, run.seeds[0])
            perturb_zero_params(model)
            check_causal(model, ids.to(run.device), arm.key)

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = next(arm for arm in run.arms if arm.key == unit.params["arm"])
        seed = unit.params["seed"]
        trained = self.trained(run, arm, seed)
        ids = self.batches(run, seed)(0)[0][:1, :-1].to(run.device)
        check_causal(trained.model, ids, arm.key)  # again: training may open a path that was shut
        if self.reports:
            yield from self._training_rows(run, arm, seed, trained)
        for judged in (arm, *(other for other in run.arms if other.options.get("weights_of") == arm.name)):
            with torch.no_grad(), self._under(run, judged, trained.model) as model:
                found = list(self.rows(run, judged, seed, model))
            yield from found

    def build(self, run: RunContext, arm: Arm, seed: int) -> Decoder:
        """The arm's decoder with its first weights."""
        return decoder_of(run, arm, self.config, self.parameters, seed)

    def settings(self, run: RunContext, arm: Arm, seed: int | None = None) -> dict[str, Any]:
        """What a training depends on, in plain values; without a seed, what the tuning does."""
        names = ("vocab", "dim", "layers", "heads", "parameters", "length", "batch", "steps", "tune_steps", "rates")
        found = {name: getattr(self, name) for name in (*names, *self.training_fields())}
        tuned = None if self.tuned_by is None else self.tuned_by.settings(run, arm)
        own = {"spec": mixer_of(run, arm).spec, "optimizer": arm.options.get("optimizer", "adamw")}
        return {**found, **own, "seed": seed, "first": run.seeds[0], "run": run.seed, "tuned_by": tuned}

    def training_fields(self) -> Sequence[str]:
        """Names of further fields that a training depends on."""
        return ()

    def tuned(self, run: RunContext, arm: Arm) -> dict[float, float]:
        """Loss on what is set aside by learning rate, infinite where training diverged; nothing for a single rate."""
        if self.tuned_by is not None:
            return self.tuned_by.tuned(run, arm)
        if len(self.rates) == 1:
            return {}
        settings = self.settings(run, arm)
        return cast(dict[float, float], run.kept(("tuned", repr(settings)), lambda: self._tuned(run, arm, settings)))

    def _tuned(self, run: RunContext, arm: Arm, settings: dict[str, Any]) -> dict[float, float]:
        place = None if run.folder is None else arm_folder(run.folder, arm.key) / f"{self.stored}tuning.json"
        if place is not None and (found := read_json(place, settings)) is not None:
            return {rate: math.inf if loss is None else loss for rate, loss in found["losses"]}
        first, losses = run.seeds[0], dict.fromkeys(self.rates, math.inf)

        def loss(trained: Trained) -> float:
            losses[trained.rate] = self.validation(run, trained.model)
            return losses[trained.rate]

        best, _ = choose_rate(
            self.rates, lambda rate: self._train(run, arm, first, rate, self.tune_steps or self.steps), loss
        )
        if place is not None:
            write_json(place, settings, losses=[[r, x if math.isfinite(x) else None] for r, x in losses.items()])
        if not self.tune_steps:
            self._keep(run, arm, first, best)
        return losses

    def trained(self, run: RunContext, arm: Arm, seed: int) -> Trained:
        """The arm's model of a seed: the one that was kept, or trained now."""
        key = repr(self.settings(run, arm, seed))
        return cast(
            Trained, run.kept_last("trained", key, lambda: self._found(run, arm, seed) or self._fitted(run, arm, seed))
        )

    def _fitted(self, run: RunContext, arm: Arm, seed: int) -> Trained:
        """Train at the chosen rate, or at the next lower one where the longer training diverges."""
        losses = self.tuned(run, arm) or dict.fromkeys(self.rates, 0.0)
        found = self._found(run, arm, seed)  # tuning may have made it
        best = best_rate(losses)
        for rate in sorted((rate for rate in losses if rate <= best), reverse=True):
            if found is not None:
                return found
            try:
                found = self._train(run, arm, seed, rate, self.steps)
            except Diverged:
                continue
            self._keep(run, arm, seed, found)
            return found
        raise UserError(f"{arm.key}: training diverges at every rate up to {best:g}; give lower ones")

    def _train(self, run: RunContext, arm: Arm, seed: int, rate: float, steps: int) -> Trained:
        model, draw, order = self.build(run, arm, seed), self.batches(run, seed), hashlib.sha256()

        def get_batch(step: int) -> tuple[Tensor, Tensor | None]:
            ids, loss_mask = draw(step)
            order.update(ids.numpy().tobytes())
            return ids.to(run.device), None if loss_mask is None else loss_mask.to(run.device)

        state = train_lm(
            model, get_batch, steps, lr=rate, optimizer=arm.options.get("optimizer", "adamw"),
            on_step=lambda _: run.advance(self.batch * self.length),
        )  # fmt: skip
        return Trained(model, rate, state.losses, state.seconds, order.hexdigest()[:16])

    def _place(self, run: RunContext, arm: Arm, seed: int) -> Any:
        return arm_folder(run.folder, arm.key) / f"{self.stored}seed-{seed}"

    def _found(self, run: RunContext, arm: Arm, seed: int) -> Trained | None:
        if run.folder is None:
            return None

        def build(hidden: int) -> Decoder:
            return Decoder(mixer_of(run, arm), dataclasses.replace(self.config, hidden=hidden)).to(run.device)

        return read_trained(self._place(run, arm, seed), self.settings(run, arm, seed), build)

    def _keep(self, run: RunContext, arm: Arm, seed: int, trained: Trained) -> None:
        if run.folder is not None:
            write_trained(self._place(run, arm, seed), self.settings(run, arm, seed), trained)

    @contextmanager
    def _under(self, run: RunContext, arm: Arm, model: Decoder) -> Iterator[Decoder]:
        """The trained model as the arm has it judged."""
        if "weights_of" in arm.options:
            other = Decoder(mixer_of(run, arm), model.config)
            other.load_state_dict(model.state_dict())
            model = other.to(run.device).eval()
        if "calibrated" not in arm.options:
            yield model
            return
        lengths = [times * self.length for times in sorted(self.times) if times > 1]
        strategy: Any = catalog.load(arm.options["calibrated"])
        ids = self.calibrating(run)
        made = strategy.calibrated(model, ids, lengths, trained=self.length, align=arm.options["align"])
        with made.on(model):
            yield model

    def _training_rows(self, run: RunContext, arm: Arm, seed: int, trained: Trained) -> Iterator[Row]:
        losses, step = trained.losses, self.batch * self.length
        tail = losses[-max(1, len(losses) // 10) :]
        points = sorted({round(i * (len(losses) - 1) / (_CURVE - 1)) for i in range(_CURVE)})
        about = {
            "rate": trained.rate, "tokens": len(losses) * step, "seconds": trained.seconds, "order": trained.order,
            "parameters": trained.model.parameters_held, "curve": [[(i + 1) * step, losses[i]] for i in points],
        }  # fmt: skip
        yield self.row("training_nll", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
        if seed != run.seeds[0] or self.tuned_by is not None:
            return
        for rate, loss in self.tuned(run, arm).items():
            value = loss if math.isfinite(loss) else math.log(self.vocab)  # as bad as knowing nothing
            more = {"diverged": not math.isfinite(loss)}
            yield self.row("tuning_nll", arm, value, "tuning", seed=seed, at={"rate": rate}, about=more)
