# SPDX-License-Identifier: Apache-2.0
"""RULER niah_multikey_2: one number is asked for of a text that is nothing but sentences like its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahMultikey2"]


@dataclass(frozen=True, kw_only=True)
class NiahMultikey2(NiahTask):
    """One needle among needles."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_multikey_2")
    hidden_in = "needles"
