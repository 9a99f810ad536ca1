# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: an alias of a constant is asked for link by link, so that two lines have to be found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...experiment.rows import Metric
from ._multikey import Multikey

__all__ = ["VariableTracking"]


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Multikey):
    """Every alias is asked for in turn; the answer names its constant and the constant's value."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "tracked",
            "variable tracking",
            higher=True,
            kind="share",
            floor=0.5,
            what="some planted facts name others, and the answer needs both",
        ),
    )
    asks: ClassVar[str] = "variable_tracking"
