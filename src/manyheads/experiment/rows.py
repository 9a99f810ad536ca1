# SPDX-License-Identifier: Apache-2.0
"""What is measured, in plain values: a metric, a row of it, and the unit of work that gives rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

__all__ = ["Metric", "Row", "Value", "WorkUnit", "conditions"]

Value = str | int | float | bool
_MOST = 12  # values of a condition that are told apart


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that a task gives for every sample.

    Attributes:
        name: in rows and checks.
        title: what a table says.
        unit: of a value; empty for a share.
        higher: whether more is better.
        kind: ``mean`` of any values; ``share`` of values in [0, 1], whose interval stays there; ``time`` of repetitions
            that are no sample of anything: a median.
        floor: a share that the baseline has to be shown to exceed, or to stay below where less is better; or nothing
            can be told of any arm.
        what: what it is, as a sentence goes on after the title, for a reader who does not know the task.
    """

    name: str
    title: str
    unit: str = ""
    higher: bool = False
    kind: Literal["mean", "share", "time"] = "mean"
    floor: float | None = None
    what: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One value: of a metric of a task, for an arm, on one sample, in one run of a seed.

    Attributes:
        task, metric, arm: names; the arm's is its ``key``.
        value: in the metric's unit.
        sample: names what was judged; arms are paired by it.
        context: names what samples share (questions about one text); independent contexts are what intervals count.
        seed: of the draw or training that this is a row of.
        at: further conditions: ``length``, ``depth``, ``offset``, ... ; paired too.
        bytes: that the strategy held, None where nothing looked.
        seconds: that this sample took, likewise.
        about: what else is worth keeping, not used in any estimate.
    """

    task: str
    metric: str
    arm: str
    value: float
    sample: str
    context: str = ""
    seed: int = 0
    at: Mapping[str, Value] = field(default_factory=dict)
    bytes: float | None = None
    seconds: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no number: a value that could not be measured is no row."""
        if not isfinite(self.value):
            raise ValueError(f"{self.task}.{self.metric} of {self.arm} on {self.sample} is not finite: {self.value}")
        if not self.context:
            object.__setattr__(self, "context", self.sample)

    def plain(self) -> dict[str, Any]:
        """The row as JSON has it, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, "")}


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """What is measured and written at once. Units are independent: any process may do any of them, in any order.

    Attributes:
        task: key of the task.
        name: unique within the task.
        cost: in any measure that is common to the run's units, for the progress display.
        label: what the progress display says.
        params: what the task has to know to do it; plain values.
        shares: names what a process keeps from one unit to the next that says the same; such units follow each other.
    """

    task: str
    name: str
    cost: float = 1.0
    label: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    shares: str = ""

    @property
    def key(self) -> str:
        """Name that is unique within a run."""
        return f"{self.task}/{self.name}"


def conditions(rows: Iterable[Row]) -> dict[str, set[Value]]:
    """Values of the conditions that have a dozen at most, by name: a figure for each says something."""
    values: dict[str, set[Value]] = {}
    for row in rows:
        for name, value in row.at.items():
            values.setdefault(name, set()).add(value)
    return {name: found for name, found in values.items() if len(found) <= _MOST}
