# SPDX-License-Identifier: Apache-2.0
"""RULER niah_multiquery: the numbers of four things, hidden in prose, are asked for at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahMultiquery"]


@dataclass(frozen=True, kw_only=True)
class NiahMultiquery(NiahTask):
    """Four needles, every one of which is asked for."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_multiquery")
    planted = 4
    asks = 4
