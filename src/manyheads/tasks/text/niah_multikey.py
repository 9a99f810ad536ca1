# SPDX-License-Identifier: Apache-2.0
"""RULER's multikey needles: one of several planted constants is asked for, after compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...experiment.rows import Metric
from ._multikey import Multikey

__all__ = ["NiahMultikey"]


@dataclass(frozen=True, kw_only=True)
class NiahMultikey(Multikey):
    """Every planted constant is asked for in turn."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "multikey",
            "one of several",
            higher=True,
            kind="share",
            floor=0.5,
            what="several facts are planted, and each is asked for after the strategy has chosen what stays",
        ),
    )
    asks: ClassVar[str] = "niah_multikey"
