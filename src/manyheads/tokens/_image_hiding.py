# SPDX-License-Identifier: Apache-2.0
"""Image tokens that a decoder's layers do not see, chosen by the attention of the layer before: the base."""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import AttentionCall
from ..calls.weights import weights
from ..errors import UserError
from ..reducing import ImageHiding, ImageTokens

__all__ = ["HidesByAttention", "mean_weights"]


def mean_weights(call: AttentionCall) -> Tensor:
    """Attention weights ``[B, T, S]``, mean over heads."""
    return torch.cat([rows.mean(1) for _, rows in weights(call)], 1)


@dataclass(frozen=True, kw_only=True)
class HidesByAttention(ImageHiding):
    """Hides image tokens from layer ``start`` on.

    Attributes:
        start: the first layer that hides any; at least 1, since the layer before says which.
    """

    start: int = field(default=1, metadata={"help": "the first layer, from 0, that hides tokens"})

    def __post_init__(self) -> None:
        if self.start < 1:
            raise UserError(f"{self.slug}: the layer before start says what is hidden: give at least 1")

    @abstractmethod
    def hidden(self, given: Tensor, images: ImageTokens, layer: int) -> Tensor | None:
        """What the next layers hide, bool broadcastable to ``[B, T, S]``, by ``given [B, T, S]``; None: as before."""

    def edit(self, call: AttentionCall) -> AttentionCall:
        images: ImageTokens = call.state["images"]
        layer = call.site.index if call.site.layer is None else call.site.layer
        if images.columns is None:
            return call
        if call.k.shape[2] != images.columns.shape[1]:
            raise UserError(
                f"{self.spec} finds image tokens by their columns, and {call.site.name} holds {call.k.shape[2]} keys "
                f"of {images.columns.shape[1]} tokens: use it without a strategy that drops some"
            )
        if layer >= self.start and (hide := images.now.get(self.spec)) is not None:
            mask, allowed = ~hide[:, None], call.allowed()
            call = call.replace(mask=mask if allowed is None else mask & allowed, is_causal=False)
        if layer >= self.start - 1:
            found = self.hidden(mean_weights(call), images, layer)
            if found is not None:
                images.now[self.spec] = found
        return call


def with_earlier(rows: Tensor, images: ImageTokens, key: object) -> Tensor:
    """Rows ``[B, S, S]`` of all tokens so far: ``rows [B, T, S]`` are the last, ``images.memory`` has the others."""
    before: Tensor | None = images.memory.get(key)
    if before is not None and before.shape[1] + rows.shape[1] == rows.shape[2]:
        rows = torch.cat([pad(before, (0, rows.shape[2] - before.shape[2])), rows], 1)
    images.memory[key] = rows
    return rows
