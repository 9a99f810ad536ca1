# SPDX-License-Identifier: Apache-2.0
"""RULER qa_1: questions of SQuAD, whose paragraph is hidden among others; its files are the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._qa import QaTask
from ._ruler import metric

__all__ = ["Squad"]


@dataclass(frozen=True, kw_only=True)
class Squad(QaTask):
    """One paragraph answers."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("qa_1")
    home: ClassVar[str] = "text/squad"
    source: ClassVar[str] = "a file in SQuAD's JSON format (dev-v2.0.json)"
