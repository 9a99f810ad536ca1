# SPDX-License-Identifier: Apache-2.0
"""RULER niah_single_3: a long code (a UUID) hidden in prose is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahSingle3"]


@dataclass(frozen=True, kw_only=True)
class NiahSingle3(NiahTask):
    """One needle of 36 characters in prose."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_single_3")
    values = "code"
