# SPDX-License-Identifier: Apache-2.0
"""Pictures of trainings: learning curves, and the maps that a field's task or a paper keeps of a trained model."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from .colours import Scale
from .page import Figure, Section
from .plots import Heat, Panel, Series, heat, lines

if TYPE_CHECKING:
    from ..experiment.rows import Row
    from .summary import Summary

__all__ = ["training_pictures"]

_WRITTEN = 150  # cells of a map that have their value written in them, at most


def training_pictures(summary: Summary) -> list[Section]:
    """Sections for what rows keep of trainings; none where nothing was trained."""
    rows = summary.results.rows
    return [
        Section("Learning curves", [_curves(summary, task, some) for task, some in _by_task(rows, "curve").items()]),
        *_maps(summary, [row for row in rows if row.about.get("pictures")]),
    ]


def _by_task(rows: list[Row], name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.about.get(name):
            found.setdefault(row.task, []).append(row)
    return found


def _curves(summary: Summary, task: str, rows: list[Row]) -> Figure:
    """A line for each arm: the mean over its trainings, from the least to the greatest."""
    series, ends = list[Series](), list[str]()
    for arm in summary.arms:
        own = [row.about["curve"] for row in rows if row.arm == arm.key]
        if not own or len({len(curve) for curve in own}) > 1:
            continue
        points = [[y for _, y in at] for at in zip(*own, strict=True)]
        line = Series(arm.key, [x for x, _ in own[0]], [mean(at) for at in points], list(map(min, points)),
                      list(map(max, points)))  # fmt: skip
        series.append(line)
        ends.append(f"{arm.key} {line.y[-1]:.3g}")
    per = rows[0].about.get("per", "tokens")
    log = "y" if min((min(line.y) for line in series), default=0.0) > 0 else ""
    panel = Panel(series, "", f"{per} seen", f"loss while training{' (log scale)' if log else ''}", log)
    said = f"Loss of {task} while training, at the end: {', '.join(ends)}."
    return Figure(
        lines([panel], said),
        f"Each line is the mean of an arm's trainings, bars go from the least to the greatest. {said} "
        "Losses of recipes with a loss of their own are not comparable; the table is.",
    )  # fmt: skip


def _maps(summary: Summary, rows: list[Row]) -> list[Section]:
    """A section for each title; maps of one shape, of several arms, share a picture."""
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for row in rows:
        for i, picture in enumerate(row.about["pictures"]):
            kind = f"{picture['axes']}{len(picture['rows'])}x{len(picture['columns'])}"
            groups.setdefault((f"{row.task} {i}", kind), []).append((row.arm, picture))
    return [Section(_title(some), [_drawn(some)]) for some in groups.values()]


def _title(some: list[tuple[str, dict[str, Any]]]) -> str:
    """What all are called, or what is shown of them."""
    called = {picture["title"] for _, picture in some}
    return called.pop() if len(called) == 1 else " by ".join(some[0][1]["axes"])


def _drawn(some: list[tuple[str, dict[str, Any]]]) -> Figure:
    first = some[0][1]
    if first.get("kind") == "lines":
        return _lined(some)
    rows, columns, axes = first["rows"], first["columns"], first["axes"]
    values = [np.array(picture["values"], float) for _, picture in some]
    low, high = min(float(np.nanmin(v)) for v in values), max(float(np.nanmax(v)) for v in values)
    titles = [arm if len({p["title"] for _, p in some}) == 1 else f"{arm}: {p['title']}" for arm, p in some]
    few = values[0].size <= _WRITTEN
    maps = [
        Heat(v, title, [[f"{x:.2f}" if abs(x) >= 0.005 else "" for x in row] for row in v] if few else None)
        for v, title in zip(values, titles, strict=True)
    ]
    scale = Scale(min(0.0, low), high if high > min(0.0, low) else min(0.0, low) + 1)
    wide = max(34.0, 6.4 * max(map(len, columns)) + 6)
    svg = heat(
        maps, rows, columns, scale=scale, axes=(axes[0], axes[1]), alt=f"{'; '.join(titles)}. {axes[0]} by {axes[1]}.",
        cell=(wide, 17.0) if few else None,
    )  # fmt: skip
    return Figure(svg, "Of the first training of each arm.")


def _lined(some: list[tuple[str, dict[str, Any]]]) -> Figure:
    """One line for a row that is the same for all arms, one of each arm for any other."""
    first = some[0][1]
    x, axes, found = [float(column) for column in first["columns"]], first["axes"], list[Series]()
    for i, name in enumerate(first["rows"]):
        own = [(arm, picture["values"][i]) for arm, picture in some]
        shared = all(values == own[0][1] for _, values in own)
        for arm, values in own[:1] if shared else own:
            y = [float("nan") if v is None else v for v in values]
            found.append(Series(name if shared else f"{name}, {arm}", x, y))
    alt = f"{first['title']}: {', '.join(one.label for one in found)}. {axes[0]} by {axes[1]}."
    return Figure(lines([Panel(found, "", axes[1], axes[0])], alt, width=760), "Of the first training of each arm.")
