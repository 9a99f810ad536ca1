# SPDX-License-Identifier: Apache-2.0
"""RULER niah_single_1: a number hidden in noise is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahSingle1"]


@dataclass(frozen=True, kw_only=True)
class NiahSingle1(NiahTask):
    """One needle in sentences that repeat."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_single_1")
    hidden_in = "noise"
