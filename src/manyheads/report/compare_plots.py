# SPDX-License-Identifier: Apache-2.0
"""Pictures of an experiment: quality against bytes and by budget, maps over two conditions, bars of all else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import formatting
from ..experiment.estimates import Estimate
from .colours import Scale
from .page import Figure, Section
from .plots import Bars, Heat, Panel, apart, bars, heat, lines, of_estimates
from .training_plots import training_pictures

if TYPE_CHECKING:
    from ..experiment import Arm
    from .summary import Measured, Summary

__all__ = ["crossover", "pictures"]

_PANELS = 4  # values of a condition that get a panel each
_ACROSS = 3  # panels of a picture


def pictures(summary: Summary) -> list[Section]:
    """A section for each kind of picture that the run has figures for."""
    judged = [one for one in summary.measured if one.ranks]
    by_budget = len([budget for budget in summary.groups if budget is not None]) > 1
    barred = [one for one in summary.measured if one.cost or (one.ranks and not by_budget)]
    found = [
        Section("Quality against bytes", [Figure(
            _against_bytes(summary, judged),
            "Every point is a strategy at a budget, on the same samples as all others; bars are 95 % intervals, of the "
            f"paired difference to {summary.base.name} or, for shares, of the share, where the band is that of "
            f"{summary.base.name}. Points of one budget stand a little apart so that they can be read. Bars that leave "
            "the picture go on: the table has them.",
        )]),
        *(Section(f"{one.name} by budget", [Figure(
            _by_budget(summary, one),
            f"Difference to {summary.base.name} on the same samples, for shares the share itself; bars are 95 % "
            "intervals.",
        )]) for one in judged if by_budget and one.metric.kind == "mean"),
        *(Section(f"{one.name} by {' and '.join(list(one.conditions)[:2])}", [Figure(
            _map(summary, one), "Each cell is the share of right answers, and how many of how many.",
        )]) for one in summary.measured if one.metric.kind == "share" and len(one.conditions) >= 2),
        *(
            Section(f"{one.name} by {next(iter(one.conditions))}", [_by_size(summary, one)])
            for one in summary.measured
            if one.metric.kind == "time" and len(one.conditions) == 1 and _sizes(one)
        ),
        Section("Costs" if by_budget else "All figures as bars", [
            Figure(_bars(summary, some), _read(summary, some))
            for some in (barred[i : i + _ACROSS] for i in range(0, len(barred), _ACROSS))
        ]),
        *training_pictures(summary),
    ]  # fmt: skip
    return [section for section in found if section.shown]


def _read(summary: Summary, some: list[Measured]) -> str:
    """How bars are read: only of what is among them."""
    times = any(one.metric.kind == "time" for one in some)
    said = [f"The dashed line is {summary.base.name}."]
    if any(one.cost for one in some):
        said.append(f"× is the ratio to {summary.base.name}.")
    if times:
        said.append("Times are medians with quartiles as thin lines.")
    if any(one.metric.kind != "time" for one in some):
        said.append(f"{'Others' if times else 'Thin lines'} {'have' if times else 'are'} 95 % intervals.")
    return " ".join(said)


def _against_bytes(summary: Summary, judged: list[Measured]) -> str:
    held = {arm.key: value for arm in summary.arms if (value := summary.held(arm))}
    base = held.get(summary.base.key)
    chosen = [next((one for one in judged if one.metric.kind == kind), None) for kind in ("mean", "share")]
    shown = [one for one in chosen if one is not None]
    if base is None or len(held) < 2 or not shown:
        return ""
    share = {key: 100 * value / base for key, value in held.items()}
    ticks = [(k, f"{k:g}") for k in apart([round(v, 1) for key, v in share.items() if key != summary.base.key])]
    panels = []
    for one in shown:
        series = []
        for name, arms, step in _stepped(summary):
            known = sorted((a for a in arms if a.key in share and _shown(summary, one, a)), key=lambda a: share[a.key])
            found = [drawn for arm in known if (drawn := _shown(summary, one, arm)) is not None]
            series.append(of_estimates(name, [share[arm.key] * step for arm in known], found, _factor(one)))
        panels.append(_panel(summary, one, series, "bytes held, % of the baseline's (log scale)", ticks))
    said = "; ".join(f"{arm.key}: {share[arm.key]:.0f} % of the bytes" for arm in summary.arms if arm.key in share)
    return lines(panels, f"Quality against bytes held. {said}. {_said(summary, shown[0])}", height=400)


def _by_budget(summary: Summary, one: Measured) -> str:
    """A panel for each value of the first condition that has few, or one of all."""
    name = next((name for name, values in one.conditions.items() if len(values) <= _PANELS), None)
    wheres: list[dict[str, Any]] = [{name: value} for value in one.conditions[name]] if name else [{}]
    panels = []
    for where in wheres:
        length = where.get("length")
        series, places = [], []
        for label, arms, step in _stepped(summary):
            known = [
                (x * step, e)
                for arm in arms
                if (x := _place(arm.budget, length)) is not None and (e := _shown(summary, one, arm, where))
            ]
            known.sort(key=lambda pair: pair[0])
            places += [x / step for x, _ in known]
            series.append(of_estimates(label, [x for x, _ in known], [e for _, e in known], _factor(one)))
        ticks = [(x, f"{x:.3g}") for x in apart(places)] if places else []
        title = ", ".join(f"{key} {value}" for key, value in where.items())
        parts = all(isinstance(arm.budget, float) and arm.budget <= 1 for arm in summary.arms if arm.budget is not None)
        axis = "budget, % (log scale)" if parts else "budget, % or number (log scale)"
        panels.append(_panel(summary, one, series, axis, ticks, title))
    return lines(panels, f"{one.name} by budget. {_said(summary, one)}", height=360)


def _panel(
    summary: Summary, one: Measured, series: Any, x: str, ticks: list[tuple[float, str]], title: str = ""
) -> Panel:  # fmt: skip
    share, base = one.metric.kind == "share", summary.estimate(one, summary.base)
    better = "higher is better" if one.metric.higher else "lower is better"
    level = (0.0, 0.0, 0.0, summary.base.name)
    if share and base is not None:
        level = (100 * base.value, 100 * base.low, 100 * base.high, summary.base.name)
    unit = "%" if share else f"more than {summary.base.name}, {one.metric.unit}".removesuffix(", ")
    return Panel(
        series, f"{title or one.name}\n({better})", x, f"{one.name}, {unit}", "x", ticks, level, fit=not share,
        limits=(-4, 104) if share else None,
    )  # fmt: skip


def _sizes(one: Measured) -> list[float]:
    """What a time was taken at: numbers of its one condition, where a line can be drawn through them."""
    (values,) = one.conditions.values()
    found = [float(v) for v in values if isinstance(v, int | float) and v > 0]
    return found if len(found) == len(values) > 2 else []


def _by_size(summary: Summary, one: Measured) -> Figure:
    """Times by the size that they were taken at, and from which on an arm is faster than the baseline."""
    (name,), sizes = one.conditions, _sizes(one)
    times = {
        arm: {size: found for size in sizes if (found := summary.estimate(one, arm, {name: size}))}
        for arm in summary.arms
    }
    series = [of_estimates(_name(arm), list(found), list(found.values())) for arm, found in times.items()]
    panel = Panel(series, "", f"{name} (log scale)", f"{one.name}, {one.metric.unit} (log scale)", "xy",
                  [(size, f"{size:g}") for size in apart(sizes)])  # fmt: skip
    met = {arm: crossover(found, times[summary.base]) for arm, found in times.items() if arm != summary.base}
    said = [f"{_name(arm)} from {name} {formatting.number(at)} on" for arm, at in met.items() if at is not None]
    return Figure(
        lines([panel], f"{one.name} by {name}. {_said(summary, one)}", height=360),
        f"Medians with quartiles. Faster than {summary.base.name}, between the sizes by straight lines: "
        f"{'; '.join(said) or 'none at the largest'}.",
    )


def crossover(mine: Mapping[float, Estimate], base: Mapping[float, Estimate]) -> float | None:
    """The size from which on ``mine`` takes less time than ``base``.

    Between measured sizes on straight lines of logarithms.

    Args:
        mine, base: times with their quartiles by size.

    Returns:
        The smallest size if it always does; None if at the largest the quartiles are not apart.
    """
    sizes = sorted(mine.keys() & base.keys())
    behind = [math.log(mine[n].value / base[n].value) for n in sizes]
    if not sizes or mine[sizes[-1]].high >= base[sizes[-1]].low:
        return None
    slow = [i for i, x in enumerate(behind) if x >= 0]
    if not slow:
        return float(sizes[0])
    i = slow[-1]
    part = behind[i] / (behind[i] - behind[i + 1])
    return float(sizes[i] * (sizes[i + 1] / sizes[i]) ** part)


def _map(summary: Summary, one: Measured) -> str:
    """A share over two conditions: one small map for each arm."""
    (first, rows), (second, columns) = sorted(list(one.conditions.items())[:2], key=lambda pair: -len(pair[1]))
    arms = [arm for arm in summary.arms if arm.key in one.rows]

    def map_of(arm: Arm) -> Heat:
        found = [[summary.estimate(one, arm, {first: row, second: column}) for column in columns] for row in rows]
        values = np.array([[math.nan if e is None else e.value for e in row] for row in found])
        texts = [["" if e is None else f"{round(e.value * e.n)}/{e.n}" for e in row] for row in found]
        return Heat(values, _name(arm), texts)

    return heat(
        [map_of(arm) for arm in arms], [_label(row) for row in rows], [_label(column) for column in columns],
        scale=Scale(0, 1), alt=f"{one.name} by {first} and {second}. {_said(summary, one)}", axes=(first, second),
        cell=(max(46.0, 100 / len(columns)), 20.0),
    )  # fmt: skip


def _bars(summary: Summary, shown: list[Measured]) -> str:
    """Bars for every arm; a metric with values below 0 has none, the table shows it."""
    panels = []
    for one in shown:
        factor = 1e-6 if one.metric.unit == "bytes" else _factor(one)
        found = [summary.estimate(one, arm) for arm in summary.arms]
        values = [None if e is None else _scaled(e, factor) for e in found]
        if not any(values) or any(e is not None and e.value < 0 for e in values):
            continue
        notes = []
        for arm, value in zip(summary.arms, values, strict=True):
            delta = summary.delta(one, arm) if one.cost else None
            times = "" if delta is None else f"  ×{delta.value:.2f}"
            notes.append("" if value is None else f"{formatting.number(value.value)}{times}")
        unit = "MB" if one.metric.unit == "bytes" else "%" if one.metric.kind == "share" else one.metric.unit
        base = values[0]
        named = f"{one.name}, {unit}" if unit and unit != one.name else one.name
        panels.append(Bars(named, values, notes, base.value if base else None))
    if not panels:
        return ""
    names = list(dict.fromkeys(arm.name for arm in summary.arms[1:]))
    tints = [-1, *(names.index(arm.name) for arm in summary.arms[1:])]
    said = " ".join(_said(summary, one) for one in shown)
    return bars([_name(arm) for arm in summary.arms], panels, f"Figures of every arm. {said}", tints)


def _scaled(found: Estimate, factor: float) -> Estimate:
    """In the unit that is drawn; without an interval where there is none."""
    if found.bounded:
        return found.scaled(factor)
    value = found.value * factor
    return Estimate(value, value, value, found.n, found.groups, found.interval)


def _shown(
    summary: Summary, one: Measured, arm: Arm, where: Mapping[str, Any] | None = None
) -> Estimate | None:  # fmt: skip
    """What is drawn of an arm: a share itself, of other metrics the difference to the baseline."""
    return summary.estimate(one, arm, where) if one.metric.kind == "share" else summary.delta(one, arm, where)


def _factor(one: Measured) -> float:
    return 100 if one.metric.kind == "share" else 1


def _stepped(summary: Summary) -> Iterator[tuple[str, list[Arm], float]]:
    """Arms other than the baseline by strategy, and the step by which their points stand apart from others'."""
    groups: dict[str, list[Arm]] = {}
    for arm in summary.arms[1:]:
        groups.setdefault(arm.name, []).append(arm)
    for i, (name, arms) in enumerate(groups.items()):
        yield name, arms, 1.035 ** (i - (len(groups) - 1) / 2)


def _place(budget: int | float | None, length: Any) -> float | None:
    """Where a budget stands on the axis: percents of a fraction, and of slots where the length is known."""
    if budget is None:
        return None
    if isinstance(budget, float) and budget <= 1:
        return 100 * budget
    return min(100.0, 100 * budget / length) if isinstance(length, int) else float(budget)


def _name(arm: Arm) -> str:
    return arm.name if arm.budget is None else f"{arm.name}, {formatting.budget(arm.budget)}"


def _label(value: Any) -> str:
    return formatting.percent(value) if isinstance(value, float) and 0 <= value <= 1 else str(value)


def _said(summary: Summary, one: Measured) -> str:
    """All arms' figures in words, for who cannot see."""
    parts = []
    for arm in summary.arms:
        if (found := summary.estimate(one, arm)) is not None:
            value = formatting.percent(found.value) if one.metric.kind == "share" else formatting.number(found.value)
            parts.append(f"{arm.key} {value}")
    return f"{one.name}: {', '.join(parts)}."
