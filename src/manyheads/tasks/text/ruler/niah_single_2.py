# SPDX-License-Identifier: Apache-2.0
"""RULER niah_single_2: a number hidden in prose is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahSingle2"]


@dataclass(frozen=True, kw_only=True)
class NiahSingle2(NiahTask):
    """One needle in essays or other prose."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_single_2")
