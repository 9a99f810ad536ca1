# SPDX-License-Identifier: Apache-2.0
"""An encoder of pages, words with boxes, that names the label of every word."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..attention.masks import zero_padding
from ..errors import UserError
from .decoder import DecoderConfig, TokenModel

__all__ = ["PageConfig", "PageEncoder"]


@dataclass(frozen=True, slots=True)
class PageConfig(DecoderConfig):
    """Size of an encoder of pages; ``vocab`` counts words, ``length`` words of a page.

    Attributes:
        labels: that a word can have.
    """

    labels: int = 2


class PageEncoder(TokenModel):
    """The blocks of an :class:`~manyheads.models.encoder.Encoder` with the mixer of ``strategy``, and a label a word.

    Mixers with a layout of their own (:mod:`manyheads.mixers.skim_attention`) are given the boxes; all others read the
    words in their order.
    """

    causal: ClassVar[bool] = False
    config_type: ClassVar[type[DecoderConfig]] = PageConfig

    def _stem(self) -> nn.Module:
        config = cast(PageConfig, self.config)
        self.head = nn.Linear(config.dim, config.labels)
        return nn.Embedding(config.vocab, config.dim)

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, **refused: Any) -> tuple[Tensor, list[Any]]:
        """Logits ``[B, T, labels]`` of pages, and None for every layer.

        Args:
            ids: ``[B, T, 5]``, of each word its number and its box: left, top, right and bottom, 0 to 1000.
            mask: ``[B, T]``, True for words, False for padding.
            refused: a page is read as a whole: no state, no packed pages.
        """
        if any(value is not None for value in refused.values()):
            raise UserError(f"an encoder of pages reads whole pages, padded by a mask: no {', '.join(refused)}")
        if ids.ndim != 3 or ids.shape[2] != 5:
            raise UserError(f"pages are [B, T, 5], a word and its box, not {list(ids.shape)}")
        if mask is not None:
            ids = ids.masked_fill(~mask[..., None], 0)
        x, after = self.mixed(zero_padding(self.embed(ids[..., 0]), mask), mask=mask, layout=ids[..., 1:])
        return self.head(self.norm(x)), after
