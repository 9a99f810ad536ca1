# SPDX-License-Identifier: Apache-2.0
"""Blocks replaced by ones with cross-attention between attention and feed-forward, as an encoder-decoder has them.

The substitute takes the weights of the block that it stands for, frozen, and its cross-attention starts with a gate at
0: it is that block at first, whereas the paper trains a whole new layer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...call import Site
from ...strategy import MidBlock
from ._embedding import Embedding
from .embedder import Place

__all__ = ["Substituted"]


@dataclass(frozen=True, kw_only=True)
class Substituted(Embedding, MidBlock):
    """Adds to the stream within a block, in front of its feed-forward part."""

    place: ClassVar[Place] = "within"

    def added(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        added = self.change(site, hidden, state)
        return torch.zeros_like(hidden) if added is None else added
