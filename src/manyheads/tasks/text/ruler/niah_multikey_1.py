# SPDX-License-Identifier: Apache-2.0
"""RULER niah_multikey_1: one of four numbers hidden in prose is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahMultikey1"]


@dataclass(frozen=True, kw_only=True)
class NiahMultikey1(NiahTask):
    """Four needles in prose, of which one is asked for."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_multikey_1")
    planted = 4
