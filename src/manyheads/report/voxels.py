# SPDX-License-Identifier: Apache-2.0
"""A picture of edits of voxel objects: before, after and target, voxels that are wrong in another colour."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import UserError
from .colours import PALETTE

__all__ = ["save"]

_PANEL = 2.2  # inches of a side
_WRONG = "#d1242f"
_KINDS = {".png", ".jpg", ".pdf", ".svg"}


def save(out: Path | str, names: Sequence[str], before: Any, after: Any, target: Any) -> None:
    """Draw edits, a row each; in ``after`` voxels that the target has not are red, missing ones are red and faint.

    Args:
        out: ``.png``, ``.jpg``, ``.pdf`` or ``.svg``.
        names: of the N edits.
        before, after, target: bool ``[N, S, S, S]``.

    Raises:
        UserError: sizes that do not belong together, or another kind of file.
    """
    out, columns = Path(out), [np.asarray(x, bool) for x in (before, after, target)]
    if len({x.shape for x in columns}) > 1 or columns[0].ndim != 4 or len(columns[0]) != len(names):
        raise UserError("before, after and target are of one size [N, S, S, S], and every edit has a name")
    if out.suffix.lower() not in _KINDS:
        raise UserError(f"{out.name}: a picture is a .png, .jpg, .pdf or .svg")
    with rc_context({"font.family": "DejaVu Sans", "text.parse_math": False, "svg.hashsalt": "manyheads"}):
        figure = Figure(figsize=(_PANEL * 3, _PANEL * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        for row, name in enumerate(names):
            meant = columns[2][row]
            for column, title in enumerate(("before", "after", "target")):
                axis: Any = figure.add_subplot(len(names), 3, 3 * row + column + 1, projection="3d")
                shown = columns[column][row]
                colours = np.full((*shown.shape, 4), _rgba(PALETTE[0], 1.0))
                if column == 1:
                    colours[shown & ~meant] = _rgba(_WRONG, 1.0)
                    colours[meant & ~shown] = _rgba(_WRONG, 0.15)
                    shown = shown | meant
                axis.voxels(shown, facecolors=colours, edgecolor=(1, 1, 1, 0.35), linewidth=0.3)
                axis.set(xlim=(0, len(meant)), ylim=(0, len(meant)), zlim=(0, len(meant)), box_aspect=(1, 1, 1))
                axis.set_title(f"{name}: {title}" if column == 0 else title, fontsize=8)
                axis.set_xlabel("x", fontsize=6, labelpad=-14)
                for one in (axis.xaxis, axis.yaxis, axis.zaxis):
                    one.set_ticklabels([])
        figure.savefig(out, dpi=110)


def _rgba(colour: str, alpha: float) -> tuple[float, ...]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue, alpha
