# SPDX-License-Identifier: Apache-2.0
"""Keep what the end of the prompt attends to.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. The last ``window``
queries of the prompt vote: their attention weights on the keys before them are summed per key, pooled over neighbours
so that runs of tokens stay together, and the best keys stay beside the window itself. The window's own keys have no
vote, so that they lift no neighbour. With grouped queries the votes of a group are summed, so that a key/value head
keeps one set of tokens (the released code repeats the heads instead and saves nothing).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference
from ..attention.accumulated_attention import accumulated_attention
from ..errors import UserError
from ._strategy import LastQueries
from ._view import CacheView

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(LastQueries):
    """Keys that the last ``window_size`` queries attend to most.

    Attributes:
        kernel_size: width of the average pool over neighbouring tokens, odd.
    """

    kernel_size: int = field(default=7, metadata={"help": "tokens pooled together, odd"})

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError("snapkv: kernel_size is a positive odd number")
        super().__post_init__()

    def score(self, view: CacheView) -> Tensor:
        assert view.queries is not None
        votes = accumulated_attention(
            view.queries.q, view.k, view.queries.positions, view.positions, scale=view.scale, softcap=view.softcap,
            sinks=view.sinks,
        )  # fmt: skip
        own = view.positions >= (view.counts - self.window_size)[:, None, None]
        votes = votes.masked_fill(own, 0.0)
        # Neighbours are neighbours in the row: slots in the order of positions, empty ones last.
        order = view.positions.masked_fill(view.positions < 0, torch.iinfo(torch.int64).max).argsort(-1)
        order = reference.repeat_kv(order[..., None], votes.shape[1])[..., 0]
        pooled = torch.nn.functional.avg_pool1d(votes.gather(2, order), self.kernel_size, 1, self.kernel_size // 2)
        return torch.empty_like(votes).scatter(2, order, pooled)
