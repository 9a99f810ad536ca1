# SPDX-License-Identifier: Apache-2.0
"""Small pictures without a drawing library at hand: palette PNGs, and SVG around them or of lines and bars.

Colours are colour-blind-safe: cividis for what has no check, blue to orange about 0 for what has. Ink and paper are CSS
variables of the page. Everything from outside is escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ..compare.drawing import COLOURS
from ..html import LEVELS, colours, data_uri, markup, number, pixels

__all__ = [
    "LEVELS", "Line", "Scale", "bars", "colours", "data_uri", "heat", "lines", "markup", "number", "pixels", "plain",
    "scale_of",
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Scale:
    """How values become colours.

    Attributes:
        low, high: ends of the colours.
        signed: about 0, in two colours.
        log: logarithmic; then ``low`` is above 0.
    """

    low: float
    high: float
    signed: bool = False
    log: bool = False

    def levels(self, values: Array) -> Array:
        """0 to LEVELS - 1, LEVELS where there is no value."""
        x = np.asarray(values, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.log:
                part = np.log(np.maximum(x, self.low) / self.low) / math.log(self.high / self.low)
            else:
                part = (x - self.low) / (self.high - self.low)
        levels = np.clip(np.nan_to_num(part * LEVELS, nan=0, posinf=LEVELS, neginf=0), 0, LEVELS - 1).astype(np.uint8)
        return np.where(np.isnan(x), LEVELS, levels).astype(np.uint8)


def scale_of(values: Array, log: bool = False) -> Scale | None:
    """The scale that fits ``values``; None where they cannot be shown (or not on a logarithmic scale)."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not known.size:
        return None
    low, high = float(known.min()), float(known.max())
    if log:
        positive = known[known > 0]
        if low < 0 or not positive.size or high / float(positive.min()) < 3:
            return None
        return Scale(max(float(positive.min()), high * 1e-4), high, log=True)
    if low < 0 < high or high <= 0 > low:
        size = max(-low, high)
        return Scale(-size, size, signed=True)
    if high == low:
        return Scale(min(0.0, low), high if high > 0 else 1.0)
    return Scale(min(0.0, low) if low < 0.5 * high else low, high)


def heat(
    values: Array, rows: Sequence[str], columns: Sequence[str], *, scale: Scale, name: str, axes: tuple[str, str],
    cell: float | None = None, tag: str = "",
) -> str:  # fmt: skip
    """A map ``[R, C]`` as SVG: a picture with labels, one pixel a cell, and its bar of colours.

    Args:
        values: NaN is left clear.
        rows, columns: labels; only as many as there is room for are written.
        scale: of the colours.
        name: what is shown, for who cannot see it.
        axes: what rows and columns are.
        cell: size of a cell; as the number of cells asks when not given.
        tag: of the picture, for the script of the page.
    """
    high, wide = values.shape
    width = cell or min(30.0, max(360.0 / wide, 3.0 if wide < 200 else 1.5))
    height = cell or min(30.0, max(7.0 if high < 60 else 3.0, min(width, 320.0 / high)))
    left, top, w, h = 46.0, 6.0, width * wide, height * high
    total_w, total_h = left + max(w, 190) + 12, top + h + 84
    out = [_text(left - 6, top + (y + 0.5) * height + 4, label, "end") for y, label in _spaced(rows, height, 13)]
    out += [_text(left + (x + 0.5) * width, top + h + 15, label, "middle") for x, label in _spaced(columns, width, 26)]
    out.append(_text(left, top + h + 33, f"rows: {axes[0]}, columns: {axes[1]}", "start", "soft"))
    picture = data_uri(pixels(scale.levels(values), scale.signed))
    mark = f' data-map="{escape(tag)}"' if tag else ""
    out.append(_image(picture, left, top, w, h, mark))
    ramp = data_uri(pixels(np.arange(LEVELS, dtype=np.uint8)[None], scale.signed))
    out.append(_image(ramp, left, top + h + 43, 190, 10))
    if scale.signed:
        ticks = [(0.0, scale.low), (0.5, 0.0), (1.0, scale.high)]
    else:
        middle = math.sqrt(scale.low * scale.high) if scale.log else (scale.low + scale.high) / 2
        ticks = [(0.0, scale.low), (0.5, middle), (1.0, scale.high)]
    anchors = ("start", "middle", "end")
    out += [
        _text(left + 190 * at, top + h + 68, number(v), anchor) for (at, v), anchor in zip(ticks, anchors, strict=True)
    ]
    if scale.log:
        out.append(_text(left + 200, top + h + 52, "log", "start", "soft"))
    return _svg("".join(out), total_w, total_h, name)


def _spaced(labels: Sequence[str], room: float, needed: float) -> list[tuple[int, str]]:
    step = max(1, math.ceil(needed / room))
    return [(i, label) for i, label in enumerate(labels) if i % step == 0]


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        label: what it is.
        x, y: its points; NaN breaks it.
        low, high: its band, if any.
        peaks: numbers of points that are marked.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    peaks: Sequence[int] = ()
    dots: bool = True


def lines(
    shown: Sequence[Line], *, x: str, y: str, name: str, width: float = 520, height: float = 190, log: bool = False,
    marks: Sequence[tuple[float, str]] = (), ticks: Sequence[tuple[float, str]] = (),
) -> str:  # fmt: skip
    """A plot of lines as SVG, with their bands, vertical ``marks``, and ``ticks`` of x in place of round numbers."""
    values = np.concatenate([np.asarray([*a.y, *(a.low or ()), *(a.high or ())], float) for a in shown])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not values.size:
        return ""
    places = np.concatenate([np.asarray(a.x, float) for a in shown])
    left, top, w, h = 58.0, 8.0, width - 82, height - 48
    up, down = float(values.max()), float(values.min())
    down = down if log or down < 0 or down > 0.5 * up else 0.0
    up = up if up > down else down + 1
    first, last = float(places.min()), float(max(places.max(), places.min() + 1e-9))

    def px(v: float) -> float:
        return left + w * (v - first) / (last - first)

    def py(v: float) -> float:
        if log:
            return top + h * (1 - math.log(max(v, down) / down) / math.log(max(up / down, 1 + 1e-9)))
        return top + h * (1 - (v - down) / (up - down))

    out = []
    for tick in _log_ticks(down, up) if log else _ticks(down, up, 4):
        out.append(f'<line x1="{left}" x2="{left + w:.0f}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" class="grid"/>')
        out.append(_text(left - 6, py(tick) + 4, number(tick), "end"))
    along = ticks or [(tick, f"{tick:,g}") for tick in _ticks(first, last, 6)]
    out += [_text(px(tick), top + h + 16, label, "middle") for tick, label in along]
    out.append(_text(left + w, top + h + 33, x, "end", "soft"))
    out.append(_text(left, top + h + 33, y + (", log scale" if log else ""), "start", "soft"))
    for at, label in marks:
        if first <= at <= last:
            out.append(f'<line x1="{px(at):.1f}" x2="{px(at):.1f}" y1="{top}" y2="{top + h:.0f}" class="mark"/>')
            out.append(_text(px(at) + 4, top + 11, label, "start", "soft"))
    for i, a in enumerate(shown):
        out.append(_line(a, px, py, COLOURS[i % len(COLOURS)], log))
    keys = _keys([a.label for a in shown]) if len(shown) > 1 else ""
    return _svg("".join(out), width, height, name) + keys


def _line(a: Line, px: Callable[[float], float], py: Callable[[float], float], colour: str, log: bool) -> str:
    def ok(v: float) -> bool:
        return math.isfinite(v) and (v > 0 or not log)

    out = ""
    if a.low is not None and a.high is not None:
        inside = [(p, lo, hi) for p, lo, hi in zip(a.x, a.low, a.high, strict=True) if ok(lo) and ok(hi)]
        if inside:
            there = [f"{px(p):.1f},{py(hi):.1f}" for p, _, hi in inside]
            back = [f"{px(p):.1f},{py(lo):.1f}" for p, lo, _ in reversed(inside)]
            out += f'<polygon points="{" ".join(there + back)}" fill="{colour}" opacity=".18"/>'
    pieces: list[list[str]] = [[]]
    for p, v in zip(a.x, a.y, strict=True):
        if ok(v):
            pieces[-1].append(f"{px(p):.1f},{py(v):.1f}")
        elif pieces[-1]:
            pieces.append([])
    for piece in pieces:
        if len(piece) > 1:
            out += f'<polyline points="{" ".join(piece)}" fill="none" stroke="{colour}" stroke-width="1.4"/>'
    spots = range(len(a.x)) if a.dots and len(a.x) <= 48 else a.peaks
    for i in spots:
        if ok(a.y[i]):
            out += f'<circle cx="{px(a.x[i]):.1f}" cy="{py(a.y[i]):.1f}" r="2.6" fill="{colour}"/>'
    return out


def bars(rows: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], *, name: str, x: str) -> str:
    """Stacked bars, one a row, of parts that are at least 0; the longest bar is as wide as the picture."""
    most = max((sum(values[i] for _, values in parts) for i in range(len(rows))), default=0) or 1.0
    left, top, w, step = 46.0, 4.0, 560.0, 20.0 if len(rows) <= 48 else 9.0
    out = []
    for i, row in enumerate(rows):
        if step > 10 or i % 4 == 0:
            out.append(_text(left - 6, top + step * i + step * 0.7, row, "end"))
        at = left
        for k, (label, values) in enumerate(parts):
            wide = w * values[i] / most
            tip = f"<title>{escape(f'{row}, {label}: {values[i]:.3f}')}</title>" if len(rows) <= 48 else ""
            out.append(
                f'<rect x="{at:.1f}" y="{top + step * i:.1f}" width="{wide:.1f}" height="{step - 3:.1f}" '
                f'fill="{COLOURS[k % len(COLOURS)]}">{tip}</rect>'
            )
            at += wide
    out.append(_text(left, top + step * len(rows) + 14, x, "start", "soft"))
    return _svg("".join(out), left + w + 10, top + step * len(rows) + 22, name) + _keys([label for label, _ in parts])


def _keys(labels: Sequence[str]) -> str:
    """What the colours of lines or bars are."""
    items = "".join(
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(label)}</span>'
        for i, label in enumerate(labels)
    )
    return f'<p class="keys">{items}</p>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    step = max(1, len(powers) // 5)
    return [10.0**p for p in powers][::step] if len(powers) > 1 else [low, high]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _image(uri: str, x: float, y: float, w: float, h: float, mark: str = "") -> str:
    return (
        f'<image href="{uri}" x="{x:g}" y="{y:g}" width="{w:.1f}" height="{h:.1f}" preserveAspectRatio="none"{mark}/>'
    )


def _svg(inside: str, width: float, height: float, name: str) -> str:
    label = escape(name)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}" '
        f'style="--width: {width:.0f}px">{inside}</svg>'
    )


def plain(values: Any) -> list[Any]:
    """Numbers of four digits, null where there is none."""
    return [[float(f"{v:.4g}") if math.isfinite(v) else None for v in row] for row in np.asarray(values, float)]
