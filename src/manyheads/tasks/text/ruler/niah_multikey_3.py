# SPDX-License-Identifier: Apache-2.0
"""RULER niah_multikey_3: one code is asked for by another, of a text that is nothing but such pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._niah import NiahTask
from ._ruler import metric

__all__ = ["NiahMultikey3"]


@dataclass(frozen=True, kw_only=True)
class NiahMultikey3(NiahTask):
    """One needle among needles, keys and values UUIDs."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("niah_multikey_3")
    hidden_in = "needles"
    keys = "code"
    values = "code"
