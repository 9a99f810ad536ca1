# SPDX-License-Identifier: Apache-2.0
"""FastV: behind the first layers of a decoder, image tokens that receive little attention are seen no more.

"An Image is Worth 1/2 Tokens After Layer 2", Chen et al., arXiv 2403.06764. In layer ``start - 1`` the attention that
each image token receives from words behind it is averaged over heads and words; all later layers hide all but the
``keep`` of the greatest mean, from words and image tokens alike. The paper drops them from the sequence, which gives
words the same and is cheaper; here they are hidden. What a prompt decides holds for what is decoded.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ..reducing import ImageTokens
from ._image_hiding import HidesByAttention

__all__ = ["FastV"]


@dataclass(frozen=True, kw_only=True)
class FastV(HidesByAttention):
    """Hides image tokens in all layers from ``start`` on.

    Attributes:
        start: the first layer that hides any; the paper's K.
        keep: share of the image tokens that is seen.
    """

    start: int = field(default=2, metadata={"help": "the first layer, from 0, that hides tokens"})
    keep: float = field(default=0.5, metadata={"help": "share of the image tokens that later layers see"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UserError(f"{self.slug}: keep is a share above 0 and at most 1, not {self.keep}")

    def hidden(self, given: Tensor, images: ImageTokens, layer: int) -> Tensor | None:
        if layer != self.start - 1:
            return None
        columns, length = images.columns, given.shape[1]
        assert columns is not None and images.real is not None
        held: Tensor | None = images.memory.get(self.spec)
        if held is None or length > 1:
            words = ~columns[:, -length:] & images.real[:, -length:]
            held = _least(given, words, columns, self.keep)
        else:
            held = torch.nn.functional.pad(held, (0, columns.shape[1] - held.shape[1]))
        images.memory[self.spec] = held
        return held[:, None].expand(-1, length, -1)


def _least(given: Tensor, words: Tensor, columns: Tensor, keep: float) -> Tensor:
    """Image tokens that receive least from words, bool ``[B, S]``."""
    received = (given * words[..., None]).sum(1).masked_fill(~columns, -torch.inf)
    order = received.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    stay = (keep * columns.sum(1, keepdim=True) - 1e-9).ceil()
    return columns & (rank >= stay)
