# SPDX-License-Identifier: Apache-2.0
"""What a task is: samples of something that can be judged, and metrics with one value per sample."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from . import seeding
from .arms import Arm
from .rows import Metric, Row, WorkUnit

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .subjects import Subject

__all__ = ["RunContext", "Task", "silent"]


def silent(part: float) -> None:
    """Report no progress."""


@dataclass
class RunContext:
    """What the tasks of one run share in one process.

    Attributes:
        subject: what is measured on, loaded when its parts are first asked for.
        arms: the baseline first, but in a part of a run (:meth:`among`).
        seed: of the whole run.
        seeds: of trainings and of repeated draws.
        device: to run on.
        data: what the user gave: ``texts``, ...
        folder: a place for files that units share (trained models), removed with the run's folder; None on a cluster.
        advance: is told of work done, in the cost of the unit at hand.
    """

    subject: Subject
    arms: tuple[Arm, ...]
    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    device: torch.device = field(default_factory=lambda: _cpu())
    data: Mapping[str, Any] = field(default_factory=dict)
    folder: Any = None
    advance: Callable[[float], None] = silent
    _kept: dict[object, Any] = field(default_factory=dict, init=False, repr=False)
    _baseline: Arm | None = field(default=None, init=False, repr=False)

    @property
    def baseline(self) -> Arm:
        """The arm that others are compared with."""
        return self.arms[0] if self._baseline is None else self._baseline

    def among(self, arms: tuple[Arm, ...], advance: Callable[[float], None]) -> RunContext:
        """This run with some of its arms, or others in their stead; baseline and what is kept stay."""
        made = dataclasses.replace(self, arms=arms, advance=advance)
        made._kept, made._baseline = self._kept, self.baseline
        return made

    def arm_of(self, unit: WorkUnit) -> Arm:
        """The arm that a unit names."""
        return next(arm for arm in self.arms if arm.key == unit.params["arm"])

    def rng(self, **axes: str | int | float) -> np.random.Generator:
        """Draws that ``axes`` name, see :mod:`.seeding`."""
        return seeding.generator(self.seed, **axes)

    def torch_rng(self, **axes: str | int | float) -> torch.Generator:
        """The same by PyTorch, on the CPU: equal on every device."""
        return seeding.torch_generator(self.seed, **axes)

    def kept(self, key: object, make: Callable[[], Any]) -> Any:
        """What ``make()`` gave when this process first asked for ``key``: contexts, a judge, a dense prefill."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def kept_last(self, slot: str, key: object, make: Callable[[], Any]) -> Any:
        """As :meth:`kept`, for something large: the slot holds only what was asked for last."""
        if self._kept.get((slot, "key"), self) != key:
            self._kept.pop(slot, None)
            self._kept[slot], self._kept[slot, "key"] = make(), key
        return self._kept[slot]

    def synchronise(self) -> None:
        """Wait for the device, so that a clock read next is right."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


class Task(ABC):
    """Base of all tasks: a frozen dataclass whose fields are its sizes, with defaults.

    A task is one file below ``tasks/``; its name is the file's. Samples are drawn by :meth:`RunContext.rng`, so that
    all arms see the same.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ()
    subject: ClassVar[str] = "causal_lm"  # kind of subject that it measures on
    alone: ClassVar[bool] = False  # times something: units run by themselves, in one process
    procedures: ClassVar[bool] = False  # of a field, and nothing is trained: its arms are procedures alone

    @property
    def name(self) -> str:
        """Name of the task, as in ``--tasks``; one of a family, a folder of tasks, is called ``family.task``."""
        _, found, inside = type(self).__module__.partition(".tasks.")
        return inside.partition(".")[2] if found else type(self).__module__.rpartition(".")[2]

    @property
    def key(self) -> str:
        """Name in rows: the label, which an experiment that has the task twice must give, or else the name."""
        return self.label or self.name

    @property
    def label(self) -> str:
        """A name of one's own for this task in an experiment, empty for its own."""
        return ""

    def metric(self, name: str) -> Metric:
        """The metric of that name."""
        for metric in self.stated:
            if metric.name == name:
                return metric
        raise ValueError(f"{self.key} has no metric {name!r}; it has {', '.join(m.name for m in self.stated)}")

    @property
    def stated(self) -> tuple[Metric, ...]:
        """The metrics as the task's fields have them: a floor by guessing can depend on how many there are to guess."""
        return self.metrics

    def floored(self, **floors: float) -> tuple[Metric, ...]:
        """The metrics with other floors, by name."""
        return tuple(dataclasses.replace(m, floor=floors.get(m.name, m.floor)) for m in self.metrics)

    def unsupported_reason(self, run: RunContext) -> str | None:
        """Why this cannot be measured on the subject, None if it can; loads no more than it must."""
        return None

    @abstractmethod
    def units(self, run: RunContext) -> Sequence[WorkUnit]:
        """The work, in its order."""

    @abstractmethod
    def measure(self, run: RunContext, unit: WorkUnit) -> Iterable[Row]:
        """Rows of a unit, for all the arms that it is about."""

    def guard(self, run: RunContext) -> None:  # noqa: B027 - most tasks have nothing to guard
        """Raise UserError if an arm that keeps everything is not the baseline; called before any unit."""

    def prepare(self, run: RunContext) -> None:  # noqa: B027 - most tasks have nothing to prepare
        """Make what units read from the run's folder, once and before any of them; where there is none, units make it.

        It is called again when a run that was cut off goes on, and leaves what is there.
        """

    def row(self, metric: str, arm: Arm, value: float, sample: str, **more: Any) -> Row:
        """A row of this task."""
        self.metric(metric)
        return Row(task=self.key, metric=metric, arm=arm.key, value=float(value), sample=sample, **more)

    def each(
        self, metric: str, arm: Arm, values: Iterable[Any], about: Sequence[Mapping[str, Any]] = (), **more: Any
    ) -> Iterator[Row]:
        """A row for each of ``values``, samples by their number; ``about`` has an entry for each, or none."""
        for i, value in enumerate(values):
            yield self.row(metric, arm, value, f"{i}", about=about[i] if about else {}, **more)

    def sized(self, size: Mapping[str, Any]) -> Task:
        """The same task with those of its fields that ``size`` names, as ``field`` or, for it alone, ``key.field``."""
        fields = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        named = {name: size[key] for name in fields for key in (name, f"{self.key}.{name}") if key in size}
        made: Task = dataclasses.replace(self, **named)  # type: ignore[type-var]
        return made
