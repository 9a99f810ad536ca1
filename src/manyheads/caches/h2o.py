# SPDX-License-Identifier: Apache-2.0
"""Keep the heavy hitters: the tokens that have received most attention so far, beside the most recent ones.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048.
Attention summed over queries is concentrated on few tokens, and those that were heavy stay heavy:
score_j = sum_t softmax(scale * q_t . k_j) over every query t since token j came, among the keys held then. Half of the
budget is for the heavy hitters, half for the most recent tokens, which have had no time to gather attention.

Differs from the paper: with grouped queries the sums of a group are added, so that a key/value head keeps one set of
tokens (the paper has no groups). A fractional budget grows with the tokens seen; the released code takes its fraction
of the prompt once and then counts slots. As in the paper the sum favours early tokens, which more queries have seen.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..attention.budget import keep_counts
from ..errors import UserError
from ._policy import SCHEDULES, Schedule
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(EvictionStrategy):
    """Keys with the largest sum of attention, and the most recent ones.

    Attributes:
        recent_share: part of the budget, rounded down, that goes to the most recent tokens.
    """

    accumulated_attention: ClassVar[bool] = True

    schedule: Schedule = field(default="step", metadata={"help": SCHEDULES})
    recent_share: float = field(default=0.5, metadata={"help": "part of the budget for the most recent tokens, 0 to 1"})

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise UserError(f"h2o: recent_share is a part of the budget, 0 to 1, not {self.recent_share}")
        super().__post_init__()

    def protected_mask(self, view: CacheView) -> Tensor:
        fresh = (keep_counts(self.budget, view.counts, self.protected) * self.recent_share).long()
        return super().protected_mask(view) | (view.positions >= (view.counts - fresh)[:, None, None])

    def score(self, view: CacheView) -> Tensor:
        assert view.accumulated_attention is not None
        return view.accumulated_attention
