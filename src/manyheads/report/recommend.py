# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads recommend`` shows: the families in a table, and their times by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..costs import Advice, Setting, ranked
from ..formatting import number, size
from .page import Figure, Headline, Notes, Page, Section, made
from .plots import Panel, Series, lines
from .table import Cell, Column, Table

if TYPE_CHECKING:
    from ..costs.advice import What

__all__ = ["curves", "page", "table"]

_SAID: dict[What, str] = {
    "prefill": "reading the prompt", "decode": "one more token of each row", "train": "a step of training",
}  # fmt: skip
_CARE = (
    "A roofline: the longer of computing and moving, by the speeds of a data sheet (measured, for --card this). It "
    "ranks families; it is no measurement, and says nothing of quality: try what it names with `manyheads compare`."
)  # fmt: skip


def table(found: Sequence[Advice], setting: Setting) -> Table:
    """A row for each family, the fastest that fits first."""
    known = setting.parameters > 0
    columns = [
        Column("family", text=True), Column("attention", "ms"), *([Column("whole model", "ms")] if known else []),
        Column("moved"), Column("state"), Column("fits", text=True), Column("against softmax", text=True),
        Column("needs", text=True), Column("to try", text=True),
    ]  # fmt: skip
    needs = {"none": "nothing", "calibration": "calibration", "required": "training"}
    rows = []
    for i, one in enumerate(found):
        cells: list[Cell | str] = [one.entry.title, Cell(number(1e3 * one.seconds), best=i == 0)]
        cells += [number(1e3 * one.whole)] if known else []
        cells += [size(one.bytes), size(one.state), "yes" if one.fits else "no", one.entry.exactness]
        rows.append([*cells, needs[one.entry.training], one.entry.spec])
    layer = setting.layer
    title = (
        f"{_SAID[setting.what]}: {layer.length:,} tokens, {layer.batch} row{'s' * (layer.batch > 1)}, "
        f"{setting.layers} layers, {setting.card.name}"
    )
    return Table(columns, rows, title, repeats=True)


def curves(setting: Setting, among: Sequence[str] = ()) -> str:
    """Times of attention by length, a line for each family, as SVG."""
    longest = max(4096, setting.layer.length * 4)
    grid = [1 << power for power in range(8, longest.bit_length())]
    times: dict[str, list[float]] = {}
    for length in grid:
        for one in ranked(replace(setting, layer=setting.layer.at(length)), among):
            times.setdefault(one.entry.title, []).append(1e3 * one.seconds)
    series = [Series(title, [float(n) for n in grid], found) for title, found in times.items()]
    marks = [(float(setting.layer.length), f"{setting.layer.length:,}")]
    ticks = [(float(n), f"{n:,}") for n in grid[::2]]
    panel = Panel(
        series, _SAID[setting.what], "tokens (log scale)", "attention, ms (log scale)", "xy", ticks, marks=marks
    )
    said = "; ".join(f"{title} {number(found[-1])}" for title, found in times.items())
    return lines([panel], f"Predicted ms of attention at {grid[-1]:,} tokens: {said}", width=900, height=420)


def page(found: Sequence[Advice], setting: Setting, run: dict[str, Any]) -> Page:
    """The page of an answer."""
    first, layer = found[0], setting.layer
    shown = table(found, setting)
    platform = setting.card.platform
    facts = [
        ("card", setting.card.name, "measured" if setting.card.measured else "data sheet"),
        ("products", f"{platform.peak_flops / 1e12:.3g} TFLOP/s", f"{layer.itemsize} bytes a number"),
        ("memory", size(setting.card.memory), f"{platform.bandwidth / 1e9:,.0f} GB/s"),
        ("layer", f"{layer.heads} heads, {layer.kv_heads} of keys", f"{layer.head_dim} channels each"),
    ]
    said = f"{first.entry.spec}: {first.entry.title}, {number(1e3 * first.seconds)} ms."
    cites = [f"{one.entry.title}: {', '.join(f'arXiv {cited}' for cited in one.entry.cites)}" for one in found]
    return Page(
        "Which family of attention", f"Which family, at {layer.length:,} tokens on {setting.card.name}?",
        shown.title, [Headline(said, "Fastest that fits" if first.fits else "Nothing fits; the fastest")],
        [
            Section("Families", [shown]),
            Section("By length", [Figure(curves(setting), "Where lines cross, the faster family changes.")]),
            Section("Where they are from", [Notes(cites)]),
            made(run, facts, _CARE, "made in Python"),
        ],
    )  # fmt: skip
