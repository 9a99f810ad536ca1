# SPDX-License-Identifier: Apache-2.0
"""Kinds of strategies of a field: a model that is trained (:class:`Recipe`), an algorithm that is run.

A field is a folder of tasks, such as ``speech``. A task owns data, split by group, collate, a reference model, the
default loss and metrics; a recipe overrides what its paper changes, one to three methods, and leaves the rest to the
task. So two recipes of one task differ in nothing but what their papers say.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .strategy import Strategy

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    Fit = Callable[
        [nn.Module, Callable[[np.random.Generator], "Batch"], Callable[[nn.Module, "Batch"], Tensor], int], None
    ]  # a module, batches drawn by a generator, the loss of one, and steps

__all__ = ["Batch", "FieldTask", "Part", "Picture", "Procedure", "Recipe", "Sample"]

Part = Literal["train", "validation", "test"]
Batch = Mapping[str, Any]  # tensors by name; what is no tensor stays on the CPU


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One thing that a model is trained or judged on.

    Attributes:
        name: of it alone.
        group: what it shares with others (a speaker, a patient, a day), of which all are in one part.
        part: ``train``, ``validation`` or ``test``.
        inputs: what a model is given, as its task says.
        target: what it should say; None for a file of the user's.
        about: more that a recipe may want: another view, a text.
    """

    name: str
    group: str
    part: Part
    inputs: Any
    target: Any = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Picture:
    """A map that a person of the field would look at; JSON's types, so that it lies among the rows of a run.

    Attributes:
        title: of it, the same for every arm.
        rows, columns: labels.
        values: ``[rows][columns]``; NaN where there is none.
        axes: what rows and columns are.
        kind: ``map`` of cells; ``lines``, one a row, over columns that are numbers.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    axes: tuple[str, str]
    kind: Literal["map", "lines"] = "map"


class FieldTask(Protocol):
    """What a recipe may ask of its task, :class:`manyheads.tasks._field.FieldTask`.

    Sizes are of every model: ``dim`` features, ``layers``, ``heads``, ``dropout``.
    """

    @property
    def dim(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dropout(self) -> float: ...

    def around(self, blocks: "Sequence[nn.Module]") -> "nn.Module":
        """The task's model with other blocks: ``block(x [B, T, dim], mask [B, T]) -> [B, T, dim]``, True: there."""

    def reference(self, width: int, kind: str = "") -> "nn.Module":
        """The model that papers are compared with; ``width`` is what is changed to match parameters."""

    def samples(self, part: Part) -> Sequence[Sample]:
        """Samples of a part."""

    def draw(self, rng: "np.random.Generator", samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples of one training step, augmented."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples; without targets where they have none."""

    def learner(self, model: "nn.Module") -> "nn.Module":
        """What is trained: the model, or a module that holds it beside a layer that is left behind."""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """Mean loss of a batch."""

    def predict(self, model: "nn.Module", batch: Batch) -> Sequence[Any]:
        """What the model says of each sample of a batch."""


class Recipe(Strategy, ABC):
    """A model of a field, trained. What is not overridden is the task's.

    Attributes:
        task: name of the task that it is trained on where none is given; other tasks of that field will do too.
    """

    task: ClassVar[str]

    def build(self, task: FieldTask, width: int) -> "nn.Module":
        """The model; ``width`` is free, and more of it means more parameters: it is what matches them to others'."""
        return task.reference(width)

    def batches(self, task: FieldTask, rng: "np.random.Generator", samples: Sequence[Sample]) -> Batch:
        """The batch of one training step, drawn by ``rng`` from samples of the training part."""
        return task.collate(task.draw(rng, samples))

    def learner(self, task: FieldTask, model: "nn.Module", width: int) -> "nn.Module":
        """What is trained: the model, or a module that holds it beside what is left behind, such as a teacher.

        ``loss`` and ``after_step`` are given this; parameters are counted, kept and used of the model alone.
        """
        return task.learner(model)

    def loss(self, task: FieldTask, model: "nn.Module", batch: Batch) -> "Tensor":
        """Loss of a training batch, a scalar."""
        return task.loss(model, batch)

    def start(self, task: FieldTask, model: "nn.Module", fit: "Fit") -> None:
        """Called before training: puts weights into ``model``, where those that :meth:`build` drew are not what it
        starts from. ``fit(module, batches, loss, steps)`` trains a module before, at the rate of the training itself.
        """

    def rate_factors(self) -> Mapping[str, float]:
        """Factor of the learning rate of parameters whose names begin so; 1 for all others."""
        return {}

    def after_step(self, model: "nn.Module", progress: float) -> None:
        """Called after each step of the optimiser: moving averages, schedules; ``progress`` runs from 0 to 1."""

    def predict(self, task: FieldTask, model: "nn.Module", batch: Batch) -> Sequence[Any]:
        """What a trained model says of each sample of a batch, as the task's own would."""
        return task.predict(model, batch)

    def pictures(self, model: "nn.Module", batch: Batch) -> Sequence[Picture]:
        """What is to be seen of a trained model on test samples, beside the task's own pictures."""
        return ()


class Procedure(Strategy, ABC):
    """An algorithm without a training loop of its own, on a task of a field.

    Attributes:
        task: name of the task where none is given.
    """

    task: ClassVar[str]

    @abstractmethod
    def run(self, task: FieldTask, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        """Rows: metric of the task, name of a test sample, value. May read the training and validation parts."""

    @staticmethod
    def scored(task: Any, samples: Sequence[Sample], said: Sequence[Any]) -> Iterable[tuple[str, str, float]]:
        """Rows of what is said of samples, each of the task's kind: all metrics that the task has of them."""
        for sample, found in zip(samples, task.scores(samples, said), strict=True):
            for metric, value in found.items():
                yield metric, sample.name, value
