# SPDX-License-Identifier: Apache-2.0
"""Drop what the last query attends to least.

Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104 (Token Omission Via Attention). A decoder whose
cache has a fixed size is a recurrent network with that many states, and the last query says which state it can spare:
score_j = mean over the heads of the layer of softmax(scale * q_last . k_j). Every head of a layer drops the same token,
so a layer keeps whole tokens. No token is protected, neither the first nor the newest.

The first forward attends to the whole prompt and is followed by one eviction, as in the released code.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference
from ._policy import SCHEDULES, Schedule
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["TOVA"]


@dataclass(frozen=True, kw_only=True)
class TOVA(EvictionStrategy):
    """Tokens that the last query attends to most, averaged over all heads."""

    schedule: Schedule = field(default="step", metadata={"help": SCHEDULES})

    @property
    def window(self) -> int:
        return 1

    def score(self, view: CacheView) -> Tensor:
        assert view.queries is not None
        x = reference.logits(
            reference.widened(view.queries.q), reference.widened(view.k), scale=view.scale, softcap=view.softcap
        )
        positions = view.positions[:, :, None, :]
        mask = (positions >= 0) & (positions <= view.queries.positions[:, None, :, None])
        weights = reference.softmax(x, reference.repeat_kv(mask, x.shape[1]), view.sinks)[:, :, 0]  # [B, H, N]
        # Heads hold the same tokens, but each in slots of its own order: the mean is taken token by token.
        last = view.positions.masked_fill(view.positions < 0, torch.iinfo(torch.int64).max)
        order = last.argsort(dim=-1, stable=True)
        order = reference.repeat_kv(order[..., None], x.shape[1])[..., 0]
        mean = weights.gather(2, order).mean(1, keepdim=True).expand_as(order)
        scores = torch.empty_like(weights).scatter(2, order, mean)
        return scores[:, :: x.shape[1] // view.k.shape[1]]
