# SPDX-License-Identifier: Apache-2.0
"""The base of tasks of a field: data parted by group, a reference model, a loss, metrics, and how papers are trained.

Arms are recipes (:mod:`manyheads.recipe`) or, without a spec, the task's reference model. All have one number of
parameters within 2 %, the same draws of training samples, the same learning rates tried on the first seed; the rate is
chosen by the task's first metric on the validation part, and the test part is read when a model is judged, not before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError, refusal
from ..experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ..recipe import Batch, Part, Picture, Procedure, Recipe, Sample
from ..training.fit import autocast
from ._field_training import FieldTraining, recipe_of, strategy_of, to_device

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MODEL_METRICS", "FieldData", "FieldTask", "parted"]

MODEL_METRICS = (
    Metric("parameters", "parameters", "parameters"),
    Metric("training_time", "training, s", "s", kind="time"),
)
_SAID = 400  # letters of a prediction that are kept with its score
_PARTS: tuple[Part, ...] = ("train", "validation", "test")


def parted(groups: Sequence[str]) -> dict[str, Part]:
    """Groups of a user's own data by part: the last fifth tests, as much before it validates, at least one each.

    Raises:
        UserError: there are fewer than three.
    """
    found = sorted(set(groups))
    if len(found) < 3:
        raise UserError(
            f"there are {len(found)} groups ({', '.join(found)}), and three are needed: to train, to choose the "
            "learning rate and to test on, for no group is in two of them"
        )
    few = max(1, len(found) // 5)
    ends: dict[int, Part] = {1: "test", 2: "validation"}
    return {group: ends.get(1 + (len(found) - 1 - i) // few, "train") for i, group in enumerate(found)}


@cache
def _read(kind: type[FieldData], folder: str) -> dict[Part, tuple[Sample, ...]]:
    """Samples by part, read once; UserError where a part is empty or a group is in two parts."""
    found = kind.read(Path(folder) if folder else None)
    home: dict[str, Part] = {}
    for sample in found:
        if home.setdefault(sample.group, sample.part) != sample.part:
            raise UserError(f"the group {sample.group} is in two parts, {home[sample.group]} and {sample.part}")
    made: dict[Part, tuple[Sample, ...]] = {part: tuple(s for s in found if s.part == part) for part in _PARTS}
    if empty := [part for part, some in made.items() if not some]:
        raise UserError(f"there is nothing to {empty[0]} on in {folder or ', '.join(kind.files)}")
    return made


@dataclass(frozen=True, kw_only=True)
class FieldData(Task):
    """The data of a task of a field, and the sizes of what is trained on them; see :class:`FieldTask`.

    Attributes:
        folder: of the user's own data, as :attr:`takes` says; the public data when empty.
        dim, layers, heads, dropout: of every model.
        width: of the baseline; 0 for ``2 * dim``. That of other arms follows from ``parameters``.
        parameters: of every arm; 0 for as many as the baseline has.
        batch: samples of a step.
        steps: of a training.
        rates: learning rates that every arm tries on the first seed.
        weight_decay: on matrices.
        samples_judged: of the test part, and at most as many of the validation part.
        only: names of the arms that are trained on it; all when empty.
        gpu_only: not on a CPU, for what would take too long there.
    """

    subject: ClassVar[str] = "trainable"
    files: ClassVar[tuple[str, ...]] = ()  # entries of data/files.toml, of which one will do
    takes: ClassVar[str] = ""  # what a folder of the user's own holds
    references: ClassVar[tuple[str, ...]] = ()  # kinds of reference models, the default first
    published: ClassVar[tuple[str, ...]] = ()  # entries of models/published.toml that are needed
    together: ClassVar[int] = 1  # files of the user's that are one sample

    folder: str = ""
    dim: int = 96
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    width: int = 0
    parameters: int = 0
    batch: int = 16
    steps: int = 600
    rates: tuple[float, ...] = (1e-3, 3e-3)
    weight_decay: float = 0.01
    samples_judged: int = 1000
    only: tuple[str, ...] = ()
    gpu_only: bool = False

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise UserError("rates are learning rates: give one or more, above 0")
        if min(self.steps, self.samples_judged, self.batch) < 1 or self.dim % self.heads:
            raise UserError("steps, samples_judged and batch count, 1 or more, and heads divide dim")

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.metrics, *MODEL_METRICS)

    @classmethod
    @abstractmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        """All samples, in an order that says nothing: of the user's folder, or the public data.

        Raises:
            UserError: they cannot be had.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Sample:
        """A file of the user's as a sample without a target; UserError where it is none."""

    @classmethod
    def joined(cls, opened: Sequence[Sample]) -> Sample:
        """Files that are one sample together, :attr:`together` of them, each as :meth:`open` gives it."""
        (sample,) = opened
        return sample

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples of one training step, augmented; here as they are, each as likely as another."""
        return [samples[int(i)] for i in rng.integers(0, len(samples), self.batch)]

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch."""

    @abstractmethod
    def truth(self, sample: Sample) -> Any:
        """The prediction that is right: what a metric is best for."""

    def illustrated(self, path: Path, said: Any) -> Any:
        """A file of the user's as an image of PIL with what was said drawn on it; None where there is no such."""
        return None

    def judged(self, part: Part) -> Sequence[Sample]:
        """Samples of a part that models are judged on, in an order that says nothing."""
        return self.samples(part)[: self.samples_judged]

    def samples(self, part: Part) -> Sequence[Sample]:
        """Samples of a part."""
        return _read(type(self), self.source)[part]

    @property
    def source(self) -> str:
        """What :meth:`read` is given; a task of several public sets names the one that is asked for."""
        return self.folder

    def context(self, sample: Sample) -> str:
        """What is independent of others and holds this sample (a person): intervals count it; empty for the sample."""
        return str(sample.about.get("context", ""))

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.gpu_only and run.device.type != "cuda":
            return "trained on a GPU, --device cuda: it would take too long on a CPU"
        return refusal(lambda: self.samples("train"))


@dataclass(frozen=True, kw_only=True)
class FieldTask(FieldData):
    """Base of tasks of a field.

    ``options`` of an arm: ``reference``, the kind of reference model where the arm has no spec; ``weights_of``, the
    name of an arm whose trained weights it is judged with under a spec of its own.
    """

    @abstractmethod
    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """The task's model with these blocks."""

    @abstractmethod
    def reference(self, width: int, kind: str = "") -> nn.Module:
        """The model that papers are compared with."""

    def learner(self, model: nn.Module) -> nn.Module:
        """What is trained: the model, or a module that holds it beside a layer that is left behind."""
        return model

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, of what :meth:`learner` gave."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Sequence[Any]:
        """What the model says of each sample."""

    @abstractmethod
    def score(self, sample: Sample, said: Any) -> Mapping[str, float]:
        """Every metric of :attr:`metrics` for one sample."""

    def scores(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Mapping[str, float]]:
        """Metrics of all samples that are judged together, those that apply to each.

        A figure of all of them (a threshold that is found on them) becomes a value of each, whose mean it is.
        """
        return [self.score(sample, one) for sample, one in zip(samples, said, strict=True)]

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        """What a person of the field would look at."""
        return ()

    def said(self, recipe: Recipe, model: nn.Module, samples: Sequence[Sample], device: torch.device) -> list[Any]:
        """Predictions for samples, batch by batch."""
        found: list[Any] = []
        with torch.no_grad(), autocast(device):
            for first in range(0, len(samples), self.batch):
                batch = to_device(self.collate(samples[first : first + self.batch]), device)
                found += recipe.predict(self, model, batch)
        return found

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for seed in run.seeds:
            for arm in run.arms:
                if "weights_of" in arm.options or (self.only and arm.name not in self.only):
                    continue
                runs = len(self.rates) if seed == run.seeds[0] else 1
                label = f"{arm.key}: {self.name.replace('_', ' ')}, training {seed + 1}"
                params = {"arm": arm.key, "seed": seed}
                found.append(WorkUnit(self.key, f"{arm.key}/{seed}", float(runs * self.steps), label, params))
        return found

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        if isinstance(strategy := strategy_of(run, arm), Procedure):
            contexts = {sample.name: self.context(sample) for sample in self.judged("test")}
            for metric, name, value in strategy.run(self, run.rng(procedure=seed)):
                yield self.row(metric, arm, value, name, seed=seed, context=contexts[name])
            return
        training = FieldTraining(self, run, arm)
        trained = training.model(seed)
        about = training.about(trained)
        for judged in (arm, *(other for other in run.arms if other.options.get("weights_of") == arm.name)):
            recipe, model = recipe_of(run, judged), trained.model
            if judged != arm:
                model = recipe.build(self, trained.width).to(run.device).eval()
                model.load_state_dict(trained.model.state_dict())
            kept = about if judged == arm else {"parameters": about["parameters"]}
            yield from self._judged(run, judged, seed, recipe, model, kept)

    def _judged(
        self, run: RunContext, arm: Arm, seed: int, recipe: Recipe, model: nn.Module, about: Mapping[str, Any]
    ) -> Iterator[Row]:
        """Rows of the test part, and of the model."""
        samples = self.judged("test")
        said = self.said(recipe, model, samples, run.device)
        for sample, one, found in zip(samples, said, self.scores(samples, said), strict=True):
            for i, (metric, value) in enumerate(found.items()):
                told = {"group": sample.group, "said": str(one)[:_SAID]} if i == 0 else {}
                yield self.row(metric, arm, value, sample.name, seed=seed, about=told, context=self.context(sample))
        more: dict[str, Any] = {}
        if seed == run.seeds[0]:
            with torch.no_grad():
                own = recipe.pictures(model, to_device(self.collate(samples[: self.batch]), run.device))
            more["pictures"] = [_plain(picture) for picture in (*self.pictures(samples, said), *own)]
        yield self.row("parameters", arm, about["parameters"], "model", seed=seed, about={**about, **more})
        if "seconds" in about:
            yield self.row("training_time", arm, about["seconds"], "training", seed=seed)


def _plain(picture: Picture) -> dict[str, Any]:
    values = [[None if x != x else round(float(x), 5) for x in row] for row in picture.values]
    return {
        "title": picture.title, "rows": list(picture.rows), "columns": list(picture.columns), "values": values,
        "axes": list(picture.axes), "kind": picture.kind,
    }  # fmt: skip
