# SPDX-License-Identifier: Apache-2.0
"""A picture of a page: what a word looks at, by head, as the colour of the words' boxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..errors import UserError
from .colours import PALETTE

__all__ = ["save"]

_ACROSS, _PANEL = 2, (4.6, 3.6)  # panels beside each other; width and height of one in inches
_FROM_TOP = {".png", ".jpg", ".pdf", ".svg"}


def save(out: Path | str, words: Sequence[str], boxes: Any, weights: Any, asked: int) -> None:
    """Draw a page once for every head; the word asked for is outlined, the darkest is what it gives most to.

    Args:
        out: ``.png``, ``.jpg``, ``.pdf`` or ``.svg``.
        words: of the page.
        boxes: ``[T, 4]``, left, top, right and bottom.
        weights: ``[H, T, T]``, as :func:`manyheads.mixers.skim_attention.page_weights` gives them for a page.
        asked: number of the word.

    Raises:
        UserError: sizes that do not belong together, or another kind of file.
    """
    places, given, out = np.asarray(boxes, float), np.asarray(weights, float), Path(out)
    count = len(words)
    if places.shape != (count, 4) or given.ndim != 3 or given.shape[1:] != (count, count) or not 0 <= asked < count:
        raise UserError(
            f"{count} words have boxes [{count}, 4] and weights [heads, {count}, {count}], and asked is one"
        )
    if out.suffix.lower() not in _FROM_TOP:
        raise UserError(f"{out.name}: a picture is a .png, .jpg, .pdf or .svg")
    heads = len(given)
    down, across = -(-heads // _ACROSS), min(_ACROSS, heads)
    with rc_context({"font.family": "DejaVu Sans", "text.parse_math": False, "svg.hashsalt": "manyheads"}):
        figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained")
        FigureCanvasAgg(figure)
        for head in range(heads):
            axis = figure.add_subplot(down, across, head + 1)
            row = given[head, asked]
            for i, (left, top, right, bottom) in enumerate(places):
                edge = "#d1242f" if i == asked else "none"
                tint = (PALETTE[0], float(row[i] / max(row.max(), 1e-12)))
                axis.add_patch(
                    Rectangle((left, top), right - left, bottom - top, facecolor=tint, edgecolor=edge, linewidth=1.4)
                )
                axis.text((left + right) / 2, (top + bottom) / 2, words[i], fontsize=5, ha="center", va="center")
            axis.set_title(f"head {head}: at most {row.max():.2f}", fontsize=8)
            axis.set_xlim(places[:, 0].min() - 20, places[:, 2].max() + 20)
            axis.set_ylim(places[:, 3].max() + 20, places[:, 1].min() - 20)
            axis.set_xticks([])
            axis.set_yticks([])
        figure.savefig(out, dpi=130)
