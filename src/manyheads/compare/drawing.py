# SPDX-License-Identifier: Apache-2.0
"""How pictures are drawn, as SVG text. Colours follow the page: ink and paper are CSS variables of it."""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .stats import Estimate

__all__ = ["COLOURS", "DASHES", "FAINT", "INK", "MARKERS", "PAPER", "legend", "limit", "line", "svg"]

# Okabe and Ito's palette, told apart with any kind of colour vision; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
INK, PAPER, FAINT = "#010203", "#fdfcfb", "#c0c1c2"  # stand-ins, replaced by CSS variables
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "manyheads", "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.5, "grid.alpha": 0.7, "axes.axisbelow": True,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip


def line(axis: Axes, x: Sequence[float], shown: Sequence[Estimate], factor: float, i: int, label: str) -> None:
    """A line of figures at ``x`` with their intervals as bars; ``i`` picks colour, marker and dashes."""
    y = np.array([e.value for e in shown]) * factor
    low, high = (np.array([getattr(e, side) for e in shown]) * factor for side in ("low", "high"))
    finite = np.isfinite(low)
    reach = [np.where(finite, np.abs(y - np.where(finite, bound, y)), 0) for bound in (low, high)]
    axis.errorbar(
        x, y, yerr=reach, label=label, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
        linestyle=DASHES[i % len(DASHES)], markersize=7, linewidth=1.6, elinewidth=1, capsize=2.5,
        markeredgecolor=PAPER,
    )  # fmt: skip


def limit(axis: Axes, shown: Sequence[Estimate]) -> None:
    """Room for every value and for intervals as long as they do not drown the values; those run out of the picture."""
    values = [e.value for e in shown]
    if not values:
        return
    reach = max(max(map(abs, values)), 1e-3)
    highs = [e.high for e in shown if math.isfinite(e.high)] or values
    lows = [e.low for e in shown if math.isfinite(e.low)] or values
    axis.set_ylim(max(min([0.0, *lows]), -0.6 * reach) - 0.06 * reach, min(max(highs), 1.8 * reach) + 0.06 * reach)


def legend(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """The labels of ``axis`` below the whole figure."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), fontsize=10)


def svg(draw: Callable[[Figure], None], width: float, height: float, alt: str) -> str:
    """Draw and return an ``<svg>`` element that scales with the page and names what it shows."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in ((INK, "ink"), (PAPER, "paper"), (FAINT, "faint")):
        text = text.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    label = escape(alt)
    opening = (
        f'<svg viewBox="{box[1]}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'role="img" style="--width: {width:.1f}in" aria-label="{label}"><title>{label}</title>'
    )
    return opening + text[text.index(">") + 1 :]
