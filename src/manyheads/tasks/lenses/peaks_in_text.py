# SPDX-License-Identifier: Apache-2.0
"""How sure a language model is at the peaks of a score, and whether they follow those of WAAD, on text.

An arm is a score, its option ``score``: ``waad``, ``fai``, ``entropy``, or blind draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...experiment import Metric, Row, RunContext, WorkUnit
from ..text._text_task import model_of
from ._rhythm import peaks_of, score_of, scores
from ._windows import WindowTask

__all__ = ["PeaksInText"]

_FIRST = 32  # token from which on peaks are looked for
_AFTER = 3  # tokens that a peak may follow one of WAAD by


@dataclass(frozen=True, kw_only=True)
class PeaksInText(WindowTask):
    """A value for each window."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("peak_entropy", "entropy of predictions at peaks", "nats"),
        Metric("follows_waad", "peaks at one of WAAD or up to three tokens after", kind="share"),
    )

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{i}", 1.0, f"window {i}", {"window": i}) for i in range(self.windows_of)]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        i = unit.params["window"]
        ids = self.windows(run)[i : i + 1, :-1]
        found = scores(run, model_of(run), ids, _FIRST, i)[0][0]
        inside = np.arange(ids.shape[1]) >= _FIRST
        tops = {name: peaks_of(np.where(inside, score, np.nan)) for name, score in found.items()}
        near = np.any([np.roll(tops["waad"], j) for j in range(_AFTER + 1)], 0)
        for arm in run.arms:
            peaks = tops[score_of(arm)]
            yield self.row("peak_entropy", arm, found["entropy"][peaks].mean(), f"{i}")
            yield self.row("follows_waad", arm, near[peaks].mean(), f"{i}")
        run.advance(unit.cost)
