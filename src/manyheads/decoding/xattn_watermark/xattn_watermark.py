# SPDX-License-Identifier: Apache-2.0
"""Gated cross-attention between the blocks of a frozen decoder."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...call import Site
from ...strategy import Residual
from ._embedding import Embedding
from .embedder import Place

__all__ = ["XattnWatermark"]


@dataclass(frozen=True, kw_only=True)
class XattnWatermark(Embedding, Residual):
    """Adds to the stream that a block leaves."""

    place: ClassVar[Place] = "between"

    def residual(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        added = self.change(site, hidden, state)
        return hidden if added is None else hidden + added
