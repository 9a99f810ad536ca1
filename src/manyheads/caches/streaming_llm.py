# SPDX-License-Identifier: Apache-2.0
"""Attention sinks and a recent window.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. Softmax needs somewhere to
put the mass it does not use, and trained models put it on the first tokens: dropping those ruins a window cache,
keeping four of them saves it. The budget is ``sinks`` first tokens and the most recent others, after every step.

Differs from the paper: kept keys keep their original rotary positions, where the paper counts positions within the
cache. Within the trained length both see the same distances inside the window; beyond it the paper's counting is
needed and this strategy does not extrapolate. The first forward attends to the whole prompt.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ._policy import SCHEDULES, Schedule
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionStrategy):
    """First ``sinks`` tokens and the most recent others."""

    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped"})
    schedule: Schedule = field(default="step", metadata={"help": SCHEDULES})

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()
