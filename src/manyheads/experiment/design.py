# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: a subject, arms that share a budget, tasks, and how large each size of it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from .arms import BASELINE, Arm, BudgetUnit
from .subjects import Subject
from .task import Task

__all__ = ["Experiment", "Planned", "Size", "Sizes"]

Size = Literal["quick", "cpu", "cuda"]
FULL = Arm(BASELINE)
_RESERVED = {"subject", "arms", "seeds"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the fields of the tasks are at each size, by name; also ``subject``, ``arms``, and ``seeds`` (how many).

    ``task.field`` is that of one task, where others have a field of the same name.

    ``quick`` stays under 30 s and ``cpu`` under ten minutes on two cores, ``cuda`` under five minutes on one H100.
    """

    quick: Mapping[str, Any] = field(default_factory=dict)
    cpu: Mapping[str, Any] = field(default_factory=dict)
    cuda: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An experiment at one size: everything that a run needs, in plain values that any process can be sent."""

    subject: Subject
    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    equal: BudgetUnit
    size: Size

    def described(self) -> dict[str, Any]:
        """What decides the rows, as ``run.json`` has it: rows of other settings are of another experiment."""
        return {
            "subject": self.subject.described(), "arms": [arm.described() for arm in self.arms],
            "tasks": {task.key: _plain(task) for task in self.tasks}, "seeds": list(self.seeds), "equal": self.equal,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is compared on what.

    Attributes:
        subject: what is measured on, or its name, see :mod:`.subjects`.
        arms: the strategies at their budgets.
        tasks: what is measured.
        baseline: what every arm is compared with; put first if it is not among the arms.
        equal: what is the same in all arms with the same budget.
        sizes: of quick and full runs.
        seeds: how many, of trainings and repeated draws; in a quick run one.
    """

    subject: str | Subject
    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]
    baseline: Arm = FULL
    equal: BudgetUnit = "slots"
    sizes: Sizes = Sizes()
    seeds: int = 3

    def at(self, size: Size, on: str | None = None) -> Planned:
        """The experiment at a size, on its own subject or on another of that kind.

        Raises:
            UserError: a value of the size is of no task, two arms or tasks have one name, or ``on`` is of another kind.
        """
        from .subjects import Convertible, subject

        values: Mapping[str, Any] = getattr(self.sizes, size)
        fields = [(task.key, f.name) for task in self.tasks for f in dataclasses.fields(task)]  # type: ignore[arg-type]
        known = {name for _, name in fields} | {f"{task}.{name}" for task, name in fields} | _RESERVED
        if unknown := sorted(set(values) - known):
            raise UserError(f"no task of this experiment has a field {', '.join(unknown)}; remove it from its sizes")
        others = values.get("arms", self.arms)
        arms = (self.baseline, *(arm for arm in others if arm.key != self.baseline.key))
        tasks = tuple(task.sized(values) for task in self.tasks)
        for what, names in (("arms", [arm.key for arm in arms]), ("tasks", [task.key for task in tasks])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(f"two {what} are called {', '.join(twice)}; give each a name of its own")
        seeds = int(values.get("seeds", 1 if size == "quick" else self.seeds))
        own = subject(values.get("subject", self.subject))
        measured = own if on is None else subject(on) if not isinstance(own, Convertible) else Convertible(on)
        if measured.kind != own.kind:
            raise UserError(f"this is measured on {_said(own.kind)}; {on} is {_said(measured.kind)}")
        return Planned(
            subject=measured, arms=arms, tasks=tasks, seeds=tuple(range(seeds)),
            equal=self.equal, size=size,
        )  # fmt: skip


def _said(kind: str) -> str:
    return {"causal_lm": "a causal language model"}.get(kind, f"a {kind}")


def _plain(task: Task) -> dict[str, Any]:
    return {"task": task.name, **{f.name: repr(getattr(task, f.name)) for f in dataclasses.fields(task)}}  # type: ignore[arg-type]
