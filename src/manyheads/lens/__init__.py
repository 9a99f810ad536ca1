# SPDX-License-Identifier: Apache-2.0
"""Lenses: strategies that only look. They name statistics of the weights, get them exact, and sum up over prompts.

Any number of lenses share one forward: the weights of a call are made once, a block of rows at a time, for all of them
(:mod:`manyheads.calls.statistics`). A lens changes no bit of what the model computes.

    spans = TokenSpans({"system": [[(0, 12)]]})
    with manyheads.watch(model, "active_dormant", "strategy_attention", roles=spans) as seen:
        model(**inputs)
    seen.compute("active_dormant").tables["sink"].top(5)

A forward without earlier tokens starts new prompts; tokens decoded after it go on with them, row by row, so that
decoding with a cache of any make and one forward over the whole give the same results. How many tokens came before is
what the model's cache says. Beam search, which reorders rows, does not; a cache that is cut back is refused.
"""

from .base import Lens, LensGroup
from .results import LensResult, Memory, PerToken, RunningMean, stack_ragged, table, table_of
from .view import AttentionView, Span, TokenSpans, device_of, max_positions

__all__ = [
    "AttentionView", "Lens", "LensGroup", "LensResult", "Memory", "PerToken", "RunningMean", "Span", "TokenSpans",
    "device_of", "max_positions", "stack_ragged", "table", "table_of",
]  # fmt: skip
