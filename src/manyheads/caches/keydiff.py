# SPDX-License-Identifier: Apache-2.0
"""Keep the keys that differ most from the others.

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
Environments", arXiv 2504.15364. Keys with low cosine similarity to the mean key tend to receive high attention, and
finding them needs no attention weight: score_j = -cos(k_j, mean_i k_i / |k_i|), per head, on cached (rotated) keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import reference
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["KeyDiff"]


@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictionStrategy):
    """Keep the keys least similar to the mean direction of all keys of the head."""

    def score(self, view: CacheView) -> Tensor:
        k = torch.nn.functional.normalize(reference.widened(view.k), dim=-1)
        filled = (view.positions >= 0)[..., None]
        anchor = torch.where(filled, k, 0.0).sum(2, keepdim=True)  # cosine does not see the factor 1 / count
        return -torch.nn.functional.cosine_similarity(k, anchor, dim=-1)
