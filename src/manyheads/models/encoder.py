# SPDX-License-Identifier: Apache-2.0
"""A small bidirectional language model around any token mixer that sees both sides."""

from typing import ClassVar

from .decoder import TokenModel

__all__ = ["Encoder"]


class Encoder(TokenModel):
    """The blocks of a :class:`~manyheads.models.decoder.Decoder`, in which a token sees what is before and behind it.

    The logits at a place are those of the token that stands there, hidden or not, so that it is trained to fill in
    (:func:`manyheads.training.language.masked_token_loss`). It has no state: ``forward`` takes a whole text, padded by
    ``mask`` or packed by ``cu_seqlens``, and the states it returns are None.
    """

    causal: ClassVar[bool] = False
