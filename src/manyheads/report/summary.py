# SPDX-License-Identifier: Apache-2.0
"""What the rows of an experiment say, arm by arm and metric by metric: whatever its tasks measure, in one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..experiment.arms import Arm
from ..experiment.checks import not_discriminative
from ..experiment.estimates import Estimate, difference, estimate, paired, ratio
from ..experiment.rows import conditions

if TYPE_CHECKING:
    from ..experiment.journal import Results
    from ..experiment.rows import Metric, Row, Value

__all__ = ["Measured", "Summary"]


@dataclass(frozen=True)
class Measured:
    """One metric of a task, as it was measured.

    Attributes:
        task: its key in the run.
        metric: what was measured.
        rows: by arm.
        weak: why nothing can be told of any arm; empty where something can.
        fixed: whether the baseline has one value on every sample, so that a difference to it says no more than the
            figure itself.
    """

    task: str
    metric: Metric
    rows: Mapping[str, Sequence[Row]]
    weak: str
    fixed: bool

    @property
    def key(self) -> str:
        """Name in documents."""
        return f"{self.task}.{self.metric.name}"

    @property
    def name(self) -> str:
        """The title without the unit."""
        return self.metric.title.removesuffix(f", {self.metric.unit}")

    @property
    def cost(self) -> bool:
        """Whether it is a time or a size: compared as a ratio, and no quality."""
        return self.metric.kind == "time" or self.metric.unit in ("bytes", "parameters")

    @property
    def ranks(self) -> bool:
        """Whether arms of one budget are ranked by it."""
        return not self.cost and not self.weak

    @property
    def conditions(self) -> dict[str, list[Value]]:
        """Values of the conditions that have a few, sorted, by name."""
        values = conditions(row for rows in self.rows.values() for row in rows)
        return {name: sorted(found, key=_order) for name, found in values.items() if len(found) > 1}

    @property
    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        m = self.metric
        return {
            "task": self.task, "metric": m.name, "title": m.title, "unit": m.unit, "higher": m.higher, "kind": m.kind,
            "not_discriminative": self.weak or None,
        }  # fmt: skip


class Summary:
    """Estimates of a run.

    Args:
        results: of any experiment, finished or not.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.experiment: dict[str, Any] = results.run["experiment"]
        self.arms = [Arm(arm["name"], budget=arm["budget"]) for arm in self.experiment["arms"]]
        self._kept: dict[tuple[Any, ...], Estimate | None] = {}

    @property
    def base(self) -> Arm:
        """What all arms are compared with."""
        return self.arms[0]

    @cached_property
    def measured(self) -> list[Measured]:
        """The metrics that have rows, in the order of tasks and metrics."""
        found = []
        groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
        for row in self.results.rows:
            groups.setdefault((row.task, row.metric), {}).setdefault(row.arm, []).append(row)
        for task, about in self.experiment["tasks"].items():
            for metric in _metrics(about):
                if rows := groups.get((task, metric.name)):
                    of_base = rows.get(self.base.key, [])
                    weak = not_discriminative(metric, of_base, self.base) or ""
                    found.append(Measured(task, metric, rows, weak, len({row.value for row in of_base}) == 1))
        return found

    @property
    def groups(self) -> dict[int | float | None, list[Arm]]:
        """Arms other than the baseline by budget, largest first; those without one last."""
        budgets = sorted(
            {arm.budget for arm in self.arms[1:]}, key=lambda b: (b is not None, isinstance(b, float), b or 0),
            reverse=True,
        )  # fmt: skip
        return {budget: [arm for arm in self.arms[1:] if arm.budget == budget] for budget in budgets}

    def rows(self, one: Measured, arm: Arm, where: Mapping[str, Value] | None = None) -> list[Row]:
        """Rows of an arm that meet the conditions ``where``."""
        wanted = (where or {}).items()
        return [row for row in one.rows.get(arm.key, ()) if all(row.at.get(name) == v for name, v in wanted)]

    def estimate(self, one: Measured, arm: Arm, where: Mapping[str, Value] | None = None) -> Estimate | None:
        """A figure of an arm; None where it has no rows."""

        def find() -> Estimate | None:
            rows = self.rows(one, arm, where)
            return estimate(rows, one.metric) if rows else None

        return self._once(("estimate", one.key, arm.key, *_items(where)), find)

    def delta(
        self, one: Measured, arm: Arm, where: Mapping[str, Value] | None = None, than: Arm | None = None
    ) -> Estimate | None:
        """The paired difference to the baseline (or ``than``): for times and sizes the ratio. None where none pairs."""
        other = than or self.base

        def find() -> Estimate | None:
            mine, beside = self.rows(one, arm, where), self.rows(one, other, where)
            if arm == other or not mine or not beside or not paired(mine, beside):
                return None
            if not one.cost:
                return difference(mine, beside, one.metric)
            return ratio(mine, beside, one.metric) if all(row.value > 0 for row in [*mine, *beside]) else None

        return self._once(("delta", one.key, arm.key, other.key, *_items(where)), find)

    def top(self, one: Measured, arms: Sequence[Arm]) -> Arm | None:
        """The arm with the best figure of those that have one; the first of equals."""
        sign = 1 if one.metric.higher else -1
        known = [(arm, found) for arm in arms if (found := self.estimate(one, arm)) is not None]
        return max(known, key=lambda pair: sign * pair[1].value)[0] if known else None

    def fails(self, one: Measured, arm: Arm, least: float | None = None) -> bool:
        """Whether a share is so low that no arm with it is called best: at the floor of the metric, or at ``least``."""
        found, floor = self.estimate(one, arm), one.metric.floor if least is None else least
        return one.metric.kind == "share" and one.metric.higher and found is not None and found.value <= (floor or 0.0)

    def best(self, one: Measured, arms: Sequence[Arm]) -> list[Arm]:
        """Of arms with one budget the best, and those that are not told apart from it.

        Empty where all are alike, and where the best share does not exceed what tells something (:meth:`fails`). An
        arm with nothing right is not among them.
        """
        known = [arm for arm in arms if self.estimate(one, arm) is not None]
        top = self.top(one, known)
        if not one.ranks or top is None or len(known) < 2 or self.fails(one, top):
            return []
        alike = [top]
        for arm in known:
            apart = self.delta(one, arm, than=top)
            if arm != top and (apart is None or not apart.excludes_zero):
                alike.append(arm)
        if len(alike) < len(known):
            return [arm for arm in alike if not self.fails(one, arm, 0.0)]
        return []

    def held(self, arm: Arm) -> float | None:
        """Bytes that the strategy held, a mean over the samples where something looked; None where nothing did."""
        known = [row.bytes for row in self.results.rows if row.arm == arm.key and row.bytes is not None]
        return sum(known) / len(known) if known else None

    def document(self) -> dict[str, Any]:
        """Everything that page and table show, of JSON's types."""
        run = self.results.run
        about = ("kind", "command", "options", "experiment", "model", "texts", "size", "skipped", "seconds")
        return {
            **{name: run.get(name) for name in about}, "finished": self.results.finished,
            "metrics": [one.fields for one in self.measured],
            "arms": [
                {
                    "arm": arm.key, "name": arm.name, "budget": arm.budget, "bytes": self.held(arm),
                    "figures": {one.key: self._figure(one, arm) for one in self.measured if arm.key in one.rows},
                }
                for arm in self.arms
            ],
            "report": str(self.results.report),
        }  # fmt: skip

    def _figure(self, one: Measured, arm: Arm) -> dict[str, Any]:
        value, delta = self.estimate(one, arm), self.delta(one, arm)
        return {
            "estimate": value.plain() if value else None,
            "ratio" if one.cost else "difference": delta.plain() if delta else None,
            "best": arm in self.best(one, self.groups.get(arm.budget, [])),
        }  # fmt: skip

    def _once(self, key: tuple[Any, ...], make: Callable[[], Estimate | None]) -> Estimate | None:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _metrics(about: Mapping[str, str]) -> tuple[Metric, ...]:
    """Metrics of a task whose fields a run has kept as text; by its defaults where this version has other fields."""
    from ast import literal_eval

    from ..tasks import load

    kind = load(about["task"])
    try:
        return kind(**{name: literal_eval(text) for name, text in about.items() if name != "task"}).stated
    except (TypeError, ValueError, SyntaxError):  # of which UserError is one
        return kind.metrics


def _items(where: Mapping[str, Value] | None) -> list[tuple[str, Value]]:
    return sorted((where or {}).items(), key=lambda pair: pair[0])


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float) and math.isfinite(value)
    return not number, float(value) if number else 0.0, str(value)
