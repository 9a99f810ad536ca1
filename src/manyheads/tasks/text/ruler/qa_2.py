# SPDX-License-Identifier: Apache-2.0
"""RULER qa_2: questions of HotpotQA, whose two paragraphs are hidden among others; its files are the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ._qa import QaTask
from ._ruler import metric

__all__ = ["HotpotQa"]


@dataclass(frozen=True, kw_only=True)
class HotpotQa(QaTask):
    """Two paragraphs answer together; SQuAD's format holds both in one."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("qa_2")
    home: ClassVar[str] = "text/hotpotqa"
    source: ClassVar[str] = "a file of HotpotQA (hotpot_dev_distractor_v1.json), or one in SQuAD's JSON format"
