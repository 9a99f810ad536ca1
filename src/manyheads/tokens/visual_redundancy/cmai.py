# SPDX-License-Identifier: Apache-2.0
"""CMAI: a word does not see the image tokens that neither it nor the words that it attends to looked at.

With ``A`` the weights of a layer, mean over heads, ``A_ti`` those of words on image tokens, and ``A_tt`` those of words
on words (itself included), each row divided by its sum:

    F = A_tt A_ti,        a word's focus on the image, through its context

In the next layer each word sees of the image the tokens of the greatest ``F``: the ``ratio`` of them that have the
least is hidden, ``least`` are always seen. Words see words as before, and image tokens everything. Inferred: the ratio
(.5), the mean over heads, from which layer on (the second), at least 4 seen, and that every layer decides anew.
Decoding keeps ``A`` of all tokens so far for each layer.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import UserError
from ...reducing import ImageTokens
from .._image_hiding import HidesByAttention, with_earlier

__all__ = ["CMAI", "focus", "least_focused"]


@dataclass(frozen=True, kw_only=True)
class CMAI(HidesByAttention):
    """Hides, for each word, image tokens without focus.

    Attributes:
        ratio: share of the image tokens that is hidden.
        least: tokens that each word sees at least.
    """

    ratio: float = field(default=0.5, metadata={"help": "share of the image tokens that each word does not see"})
    least: int = field(default=4, metadata={"help": "image tokens that each word sees at least"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1 or self.least < 1:
            raise UserError(f"{self.slug}: ratio is a share from 0 to 1, and at least one token is seen")

    def hidden(self, given: Tensor, images: ImageTokens, layer: int) -> Tensor:
        columns = images.columns
        assert columns is not None
        every = with_earlier(given, images, (self.spec, layer))
        words = ~columns[:, -given.shape[1] :]
        hide = least_focused(focus(given, every, columns), columns, self.ratio, self.least)
        return hide & words[..., None]


def focus(given: Tensor, every: Tensor, columns: Tensor) -> Tensor:
    """F ``[B, T, S]`` on image tokens, 0 elsewhere.

    Args:
        given: weights ``[B, T, S]`` of the last T tokens.
        every: of all tokens, ``[B, S, S]``.
        columns: which are of images, ``[B, S]``.
    """
    among = given.masked_fill(columns[:, None], 0.0)
    among = among / among.sum(-1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
    return among @ every.masked_fill(~columns[:, None], 0.0)


def least_focused(focused: Tensor, columns: Tensor, ratio: float, least: int) -> Tensor:
    """The image tokens of the least focus in each row ``[B, T, S]``, bool; of equal ones the later ones."""
    count = columns.sum(1)
    hide = torch.minimum((ratio * count + 1e-9).floor().long(), (count - least).clamp(min=0))
    score = focused.masked_fill(~columns[:, None], torch.inf)
    order = score.flip(-1).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank.flip(-1) < hide[:, None, None]) & columns[:, None]
