# SPDX-License-Identifier: Apache-2.0
"""Tokens in colour: what a lens says of each token of a prompt, its peaks, and its line."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formatting import number
from .colours import plain
from .page import Card, Tokens
from .plots import Panel, Series, lines

if TYPE_CHECKING:
    from ..inspect.prompts import Prompt
    from ..inspect.run import Inspection

__all__ = ["token_view", "word"]

_PROMPTS = 2  # whose tokens are in the page
_LEVELS = 16  # colours of tokens on each side of 0


def word(text: str) -> str:
    """A token as it is shown: a mark for an end of line, and for what no screen shows."""
    breaks = text.count("\n")
    text = text.replace("\r", "").replace("\n", "↵")
    return "".join(c if c == "\t" or unicodedata.category(c)[0] != "C" else "·" for c in text) + "\n" * bool(breaks)


def _series(seen: Inspection) -> Iterator[tuple[str, list[Any]]]:
    """All series ``[T]`` by label; of several values a token, each."""
    for spec, found in seen.found.items():
        for name, rows in found.series.items():
            label = f"{name} ({spec})"
            if not rows:
                continue
            wide = np.asarray(rows[0])
            if wide.ndim == 1:
                yield label, list(rows)
            else:
                flat = [np.asarray(row).reshape(len(row), -1) for row in rows]
                yield from ((f"{label} {i}", [row[:, i] for row in flat]) for i in range(min(4, flat[0].shape[1])))
    if math.isfinite(seen.loss):
        yield "loss of the token, nats", list(seen.losses)


def _peaks(values: Any) -> list[int]:
    """Places that exceed both neighbours and nineteen of twenty values."""
    x = np.asarray(values, float)
    known = x[np.isfinite(x)]
    if known.size < 8 or len(np.unique(known)) < min(12, known.size):  # steps have no peaks
        return []
    padded = np.concatenate([[-np.inf], np.where(np.isfinite(x), x, -np.inf), [-np.inf]])
    high = (padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:]) & (x >= np.quantile(known, 0.95))
    return [int(i) for i in np.flatnonzero(high)]


def _colour_ends(values: Any) -> tuple[float, float]:
    """Values of no colour and of the strongest; outliers above the 99th percentile do not pale the rest."""
    x = np.asarray(values, float)
    size = np.abs(x[np.isfinite(x)])
    top = float(np.quantile(size, 0.99)) if size.size else 0.0
    top = top or (float(size.max()) if size.size else 0.0)
    low = float(np.nanmin(x)) if size.size else 0.0
    base = low if low > 0.5 * top else 0.0  # values that all are large differ by what is above the least
    return float(f"{base:.4g}"), float(f"{max(top, base + 1e-30):.4g}")


def _colour_levels(values: Any, ends: tuple[float, float]) -> list[int]:
    """-16 to 16: how strong the colour of each token is."""
    base, top = ends
    if top <= base:
        return [0] * len(values)
    part = np.clip(np.nan_to_num((np.asarray(values, float) - base) / (top - base)), -1, 1)
    return [int(v) for v in np.round(part * _LEVELS)]


def token_view(seen: Inspection) -> tuple[Tokens | None, list[Card], list[Any], list[Any]]:
    """The tokens of the first prompt in colour, the lines of all series, and what the script needs to show others."""
    count = min(_PROMPTS, len(seen.prompts))
    kept = [(label, rows) for label, rows in _series(seen) if any(np.isfinite(np.asarray(rows[0], float)))]
    if not kept:
        return None, [], [], []
    kind = seen.run["settings"].get("part", "")
    if seen.run["settings"].get("reads") and kind != "decoder":  # patches are drawn over the image, frames are times
        words = [{"name": p.name, "tokens": [f"{t} " for t in seen.tokens[i]]} for i, p in enumerate(seen.prompts[:1])]
        lines_ = [_plot(label, _fit(rows[0], len(seen.prompts[0].ids)), "frame") for label, rows in kept if kind]
        return None, lines_, [] if kind == "cross" else words, []
    prompts: list[dict[str, Any]] = [
        {"name": p.name, "tokens": [word(t) for t in seen.tokens[i]], "roles": _roles_of(p)}
        for i, p in enumerate(seen.prompts[:count])
    ]
    series: list[dict[str, Any]] = []
    plots = []
    for label, rows in kept:
        fitted = [_fit(row, len(seen.prompts[i].ids)) for i, row in enumerate(rows[:count])]
        series.append({
            "label": label,
            "rows": [{"values": plain([r])[0], "ends": _colour_ends(r), "peaks": _peaks(r)} for r in fitted],
        })  # fmt: skip
        plots.append(_plot(label, fitted[0]))
    shown, chosen = prompts[0], series[0]["rows"][0]
    peaks = set(chosen["peaks"])
    tokens = []
    levels = _colour_levels([math.nan if v is None else v for v in chosen["values"]], chosen["ends"])
    for i, (text, level) in enumerate(zip(shown["tokens"], levels, strict=True)):
        marks = [f"p{level}" if level > 0 else f"n{-level}" if level < 0 else ""]
        marks += ["peak"] * (i in peaks) + ["role"] * bool(shown["roles"][i])
        tokens.append((text, " ".join(filter(None, marks))))
    return Tokens(series[0]["label"], tokens), plots, prompts, series


def _fit(row: Any, size: int) -> Any:
    """``row`` with exactly ``size`` values."""
    x = np.asarray(row, float)[:size]
    return np.concatenate([x, np.full(size - len(x), np.nan)])


def _roles_of(prompt: Prompt) -> list[str]:
    names = [""] * len(prompt.ids)
    for role, spans in prompt.roles.items():
        for start, stop in spans:
            for i in range(start, min(stop, len(names))):
                names[i] = role
    return names


def _plot(label: str, values: Any, token: str = "token") -> Card:
    peaks, known = _peaks(values), values[np.isfinite(values)]
    log = bool(known.min() > 0 and known.max() > 100 * np.median(known))
    series = Series(label, list(range(len(values))), [float(f"{v:.4g}") for v in values], peaks=peaks)
    panel = Panel([series], "", token, "log scale" if log else "", "y" if log else "")
    said = f"{label} by {token}, from {number(known.min())} to {number(known.max())}, {len(peaks)} peaks"
    return Card(label, lines([panel], said, height=170), width="lines")
