# SPDX-License-Identifier: Apache-2.0
"""Pictures as SVG text: lines and points with intervals, bars with intervals, stacked bars, heat maps.

All take plain numbers and an ``alt`` text that says what is shown. Ink and paper are CSS variables of the page, sizes
are CSS pixels. Texts from outside are escaped by matplotlib, which also is what draws.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..experiment.estimates import Estimate
from ..formatting import number
from .colours import LEVELS, PALETTE, Array, Scale, colours

__all__ = ["Bars", "Heat", "Panel", "Series", "apart", "bars", "heat", "lines", "of_estimates", "stacked"]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_INK, _PAPER, _FAINT = "#010203", "#fdfcfb", "#c0c1c2"  # stand-ins, replaced by CSS variables
_ROOM = 1000  # CSS pixels that a picture may be wide
_TITLE = 34  # letters of a title above bars
_APART = 1.25  # ratio of labels on a log axis that do not touch
_LETTER, _KEY = 6.4, 44  # CSS pixels of a letter of a legend, and of what stands before a label
_LABEL = 36  # letters of a label beside a row
_BARS = 24  # points at most whose intervals are bars; of more they are a band
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "manyheads", "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT, "axes.linewidth": 0.8, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "grid.alpha": 0.7,
    "axes.labelsize": 9, "axes.grid": True, "grid.color": _FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "path.simplify_threshold": 0.5, "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line: its points (NaN breaks it), their interval if any, and numbers of points that are marked."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    peaks: Sequence[int] = ()


def of_estimates(label: str, x: Sequence[float], found: Sequence[Estimate], factor: float = 1) -> Series:
    """The line of estimates at ``x``, times ``factor``."""
    value, low, high = ([factor * getattr(e, side) for e in found] for side in ("value", "low", "high"))
    return Series(label, x, value, low, high)


@dataclass(frozen=True)
class Panel:
    """One pair of axes with lines.

    Attributes:
        series: the lines; the place in the list picks colour, marker and dashes.
        title, x, y: heading, and labels of the axes.
        log: ``x``, ``y`` or ``xy`` for logarithmic axes.
        ticks: places and labels of the x axis; round numbers where not given.
        level: a line across, with its interval and label: what all are compared to.
        marks: vertical lines with labels.
        fit: leave room for intervals only as far as they do not drown the values.
        limits: of the y axis, where they are known.
    """

    series: Sequence[Series]
    title: str = ""
    x: str = ""
    y: str = ""
    log: str = ""
    ticks: Sequence[tuple[float, str]] = ()
    level: tuple[float, float, float, str] | None = None
    marks: Sequence[tuple[float, str]] = ()
    fit: bool = False
    limits: tuple[float, float] | None = None


def lines(panels: Sequence[Panel], alt: str, *, width: float = 0, height: float = 300) -> str:
    """Panels of lines beside each other, with one legend below; empty where no panel has a number."""
    if not any(math.isfinite(v) for panel in panels for one in panel.series for v in one.y):
        return ""

    width = width or (500 if len(panels) == 1 else min(_ROOM, 440 * len(panels)))
    named = list(dict.fromkeys(one.label for panel in panels for one in panel.series))
    across = max(1, min(len(named), 5, int(width // (_KEY + _LETTER * max(map(len, named), default=1)))))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _panel(axis, panel)
        found = [axis.get_legend_handles_labels() for axis in axes]
        handles = dict(pair for each in found for pair in zip(each[1], each[0], strict=True))
        if len(handles) > 1 or any(panel.level is not None for panel in panels):
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across)

    rows = math.ceil(len(named) / across)
    return _svg(draw, width, height + 18 * max(0, rows - 2), alt)


def _panel(axis: Axes, panel: Panel) -> None:
    for i, one in enumerate(panel.series):
        _line(axis, one, i)
    if panel.level is not None:
        value, low, high, label = panel.level
        if high > low:
            axis.axhspan(low, high, color=_FAINT, alpha=0.35, linewidth=0)
        axis.axhline(value, color=_INK, linewidth=1.1)
        axis.text(1.01, value, label, transform=axis.get_yaxis_transform(), va="center")
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if "x" in panel.log:
        axis.set_xscale("log")
        axis.set_xticks([], minor=True)
    if "y" in panel.log:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.yaxis.set_major_formatter(lambda y, _: number(y))
        axis.yaxis.set_minor_formatter("")
    if panel.ticks:
        axis.set_xticks([at for at, _ in panel.ticks], [label for _, label in panel.ticks])
    for at, label in panel.marks:
        low, high = axis.get_xlim()
        if low <= at <= high:
            axis.axvline(at, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axis.text(at, 1.0, f" {label}", transform=axis.get_xaxis_transform(), va="top", fontsize=8)
    if panel.limits is not None:
        axis.set_ylim(*panel.limits)
    elif panel.fit:
        _fit(axis, panel.series)


def _line(axis: Axes, one: Series, i: int) -> None:
    style: Any = {"color": PALETTE[i % len(PALETTE)], "linestyle": _DASHES[i % len(_DASHES)], "label": one.label}
    x, y = np.asarray(one.x, float), np.asarray(one.y, float)
    many = len(x) > _BARS
    if not many:
        style |= {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 6, "markeredgecolor": _PAPER}
    if one.low is None or one.high is None:
        axis.plot(x, y, linewidth=1.1 if many else 1.6, **style)
    elif many:
        axis.plot(x, y, linewidth=1.1, **style)
        axis.fill_between(x, one.low, one.high, color=style["color"], alpha=0.18, linewidth=0)
    else:
        bounds = [np.asarray(bound, float) for bound in (one.low, one.high)]
        known = np.isfinite(bounds[0]) & np.isfinite(bounds[1])
        reach = [np.where(known, np.abs(y - np.where(known, bound, y)), 0) for bound in bounds]
        axis.errorbar(x, y, yerr=reach, linewidth=1.6, elinewidth=1, capsize=2.5, **style)
    peaks = list(one.peaks)
    if peaks:
        axis.plot(x[peaks], y[peaks], "o", markersize=3.5, color=PALETTE[1])


def _fit(axis: Axes, shown: Sequence[Series]) -> None:
    """Room for every value and for intervals as long as they do not drown the values; those run out of the picture."""
    values = [v for one in shown for v in one.y if math.isfinite(v)]
    if not values:
        return
    reach = max(max(map(abs, values)), 1e-3)
    highs = [v for one in shown for v in one.high or () if math.isfinite(v)] or values
    lows = [v for one in shown for v in one.low or () if math.isfinite(v)] or values
    low = min(0.0, *values, max(min(lows), -0.6 * reach))
    high = max(0.0, *values, min(max(highs), 1.8 * reach))
    axis.set_ylim(low - 0.06 * reach, high + 0.06 * reach)


def apart(values: Sequence[float]) -> list[float]:
    """``values`` without those that would print over one another on a log scale."""
    shown: list[float] = []
    for value in sorted(values):
        if not shown or value / shown[-1] > _APART:
            shown.append(value)
    return shown


@dataclass(frozen=True)
class Bars:
    """One panel of bars: a title, an estimate and a note for every label, and what all are compared to."""

    title: str
    values: Sequence[Estimate | None]
    notes: Sequence[str]
    base: float | None = None


def bars(labels: Sequence[str], panels: Sequence[Bars], alt: str, tints: Sequence[int]) -> str:
    """Panels of bars beside each other, a bar for each label, with its interval and its note.

    ``tints`` are the numbers of the colours of the labels, -1 for grey.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            known = [e for e in panel.values if e is not None]
            top = max((max(e.value, e.high) for e in known if math.isfinite(e.high)), default=1.0) or 1.0
            for y, (value, note) in enumerate(zip(panel.values, panel.notes, strict=True)):
                if value is None:
                    continue
                axis.barh(y, value.value, height=0.7, color=PALETTE[tints[y] % len(PALETTE)], alpha=0.85)
                if value.high > value.low:
                    axis.plot([value.low, value.high], [y, y], color=_INK, linewidth=1.2, solid_capstyle="butt")
                axis.text(1.62 * top, y, note, ha="right", va="center", fontsize=8.5)
            if panel.base is not None:
                axis.axvline(panel.base, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axis.set(xlim=(0, 1.62 * top), title=textwrap.fill(panel.title, _TITLE))
            axis.set_xticks([t for t in axis.get_xticks() if 0 <= t <= 1.001 * top][::2])
            axis.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(labels)), list(labels))
        axes[0].set_ylim(len(labels) - 0.4, -0.6)

    high = max(len(textwrap.wrap(panel.title, _TITLE)) for panel in panels)
    return _svg(draw, min(_ROOM, 280 * len(panels) + 170), 26 * len(labels) + 66 + 14 * high, alt)


def stacked(rows: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], alt: str, x: str) -> str:
    """Stacked bars, one a row, of parts that are at least 0."""
    step = 20 if len(rows) <= 24 else 9

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        left = np.zeros(len(rows))
        for k, (label, values) in enumerate(parts):
            axis.barh(range(len(rows)), values, left=left, height=0.86, color=PALETTE[k % len(PALETTE)], label=label)
            left += np.asarray(values, float)
        shown = range(0, len(rows), 1 if step > 10 else 4)
        axis.set_yticks(list(shown), [rows[i] for i in shown])
        axis.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, float(left.max(initial=0)) or 1.0), xlabel=x)
        axis.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=min(len(parts), 6))

    return _svg(draw, 760, step * len(rows) + 90, alt)


@dataclass(frozen=True)
class Heat:
    """One heat map: values ``[R, C]`` (NaN is left clear), a title, texts in the cells, and cells with a frame."""

    values: Array
    title: str = ""
    texts: Sequence[Sequence[str]] | None = None
    outlined: Sequence[tuple[int, int]] = ()


def heat(
    maps: Sequence[Heat], rows: Sequence[str], columns: Sequence[str], *, scale: Scale, alt: str,
    axes: tuple[str, str], tag: str = "", cell: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """Heat maps of one scale, beside and below each other as there is room, with one bar of colours.

    Args:
        maps: the maps, all of one shape.
        rows, columns: labels of every map; only as many as there is room for are written.
        scale: of the colours.
        alt: what is shown, for who cannot see it.
        axes: what rows and columns are.
        tag: of the (only) map, for the script of the page.
        cell: width and height of a cell in CSS pixels; as the number of cells asks when not given.
    """
    high, wide = len(rows), len(columns)
    width = cell[0] if cell else min(26.0, max(212.0 / wide, 2.6 if wide < 200 else 1.5))
    height = cell[1] if cell else min(26.0, max(7.0 if high < 60 else 3.0, min(width, 300.0 / high)))
    rows = [_clipped(label) for label in rows]
    left = max(46.0, _LETTER * max(map(len, rows), default=0) + 10)
    gap, above = 24.0, 22.0 if any(one.title for one in maps) else 6.0
    w, h = width * wide, height * high
    slot = max(w, 100, *(6.6 * len(one.title) for one in maps)) + gap
    across = min(len(maps), max(1, int((_ROOM - left) // slot)))
    down = math.ceil(len(maps) / across)
    total_w = left + max(across * slot - gap, 200) + 12
    total_h = down * (above + h + 22) + 58

    def place(figure: Figure, x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))

    def draw(figure: Figure) -> None:
        for i, one in enumerate(maps):
            r, c = divmod(i, across)
            axis = place(figure, left + c * slot, r * (above + h + 22) + above, w, h)
            _map(axis, one, scale, tag)
            axis.set_xticks(*_spaced(columns, width, 30))
            axis.set_yticks(*(_spaced(rows, height, 14) if c == 0 else ([], [])))
        y = down * (above + h + 22)
        figure.text(left / total_w, 1 - (y + 14) / total_h, f"rows: {axes[0]}, columns: {axes[1]}", fontsize=8,
                    alpha=0.75)  # fmt: skip
        bar = place(figure, left, y + 24, 190, 9)
        bar.imshow(scale_strip(scale), aspect="auto", interpolation="none")
        bar.set_yticks([])
        ends = [number(v) for v in scale.ticks()]
        bar.set_xticks([-0.5, LEVELS / 2 - 0.5, LEVELS - 0.5], [ends[0], ends[1], ends[2] + " log" * scale.log])
        for axis in figure.axes:
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
            axis.tick_params(labelsize=8, pad=2)

    return _svg(draw, total_w, total_h, alt, layout="none")


def _clipped(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def scale_strip(scale: Scale) -> Array:
    """The colours of a scale in a row."""
    return np.array(colours(scale.signed), np.uint8)[None]


def _map(axis: Axes, one: Heat, scale: Scale, tag: str) -> None:
    shown = scale.rgba(one.values)
    axis.imshow(shown, aspect="auto", interpolation="none", gid=f"map-{tag}" if tag else None)
    axis.set_title(one.title, fontsize=8.5, fontweight="normal", pad=4)
    for r, c in one.outlined:
        axis.plot([c - 0.5, c + 0.5, c + 0.5, c - 0.5, c - 0.5], [r - 0.5, r - 0.5, r + 0.5, r + 0.5, r - 0.5],
                  color="#d1242f", linewidth=1.1, clip_on=False, scalex=False, scaley=False)  # fmt: skip
    for (r, c), colour in ((at, shown[at]) for at in np.ndindex(shown.shape[:2]) if one.texts):
        if colour[3] and one.texts:
            dark = float(colour[:3] @ np.array([0.299, 0.587, 0.114])) < 140
            axis.text(c, r, one.texts[r][c], ha="center", va="center", fontsize=8,
                      color="#ffffff" if dark else "#14181c")  # fmt: skip


def _spaced(labels: Sequence[str], room: float, needed: float) -> tuple[list[int], list[str]]:
    step = max(1, math.ceil(needed / room)) if max(map(len, labels), default=0) * 7 > room or needed < 20 else 1
    return list(range(0, len(labels), step)), list(labels[::step])


def _svg(draw: Callable[[Figure], None], width: float, height: float, alt: str, layout: Any = "constrained") -> str:
    """Draw and return an ``<svg>`` element that scales with the page and names what it shows."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width / 96, height / 96), layout=layout)
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    label = escape(alt)
    opening = (
        f'<svg viewBox="{box[1]}" role="img" style="--width: {width:.0f}px" aria-label="{label}"><title>{label}</title>'
    )
    return opening + _small(text[text.index(">") + 1 :])


def _small(text: str) -> str:
    """The inside of an SVG without what a page needs not; ink, paper and maps as the page names them."""
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text.replace("base64,\n", "base64,"))
    text = re.sub(r' font-family: [^;"]*;| transform="rotate\(-0 [^"]*"| xmlns[:\w]*="[^"]*"', "", text)
    text = re.sub(r' id="map-([^"]*)"', r' data-map="\1"', text.replace("xlink:href", "href"))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r'<path d="[^"]*" style="fill: none"/>', "", text)
    text = re.sub(r'="(?!matrix|data:)[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), text)
    while (less := re.sub(r"<g/>|<g></g>|<defs> ?</defs>|(?<=>) (?=<)", "", text)) != text:
        text = less
    for colour, variable in ((_INK, "ink"), (_PAPER, "paper"), (_FAINT, "faint")):
        text = text.replace(colour, f"var(--{variable})")
    return text
