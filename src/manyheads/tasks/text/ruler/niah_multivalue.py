# SPDX-License-Identifier: Apache-2.0
"""RULER niah_multivalue: the four numbers of one thing, hidden in prose, are all asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahMultivalue"]


@dataclass(frozen=True, kw_only=True)
class NiahMultivalue(NiahTask):
    """Four needles with one key; every value is expected."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_multivalue")
    per_key = 4
