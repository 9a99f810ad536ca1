# SPDX-License-Identifier: Apache-2.0
"""One prompt with images, read several times side by side: each reading hides columns, or is given other images.

Ids and positions are the same in all rows of the batch, and a column that a row hides stays hidden from all of its
later tokens, so that one cache holds them all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import UserError
from .cache import cache_arguments, given_with

__all__ = ["Streams", "image_columns"]


def image_columns(model: nn.Module, ids: Tensor, by: str) -> Tensor:
    """Which tokens of ``ids [1, T]`` stand for patches of images, bool ``[T]``, for the strategy ``by``.

    Raises:
        UserError: the model reads no images, has positions of several axes, or there is no image.
    """
    config: Any = model.config
    token = getattr(config, "image_token_id", None)
    decoder = config.get_text_config(decoder=True)
    if token is None or decoder is config:
        raise UserError(f"{by} writes about images, and {type(model).__name__} reads none; give a model as LLaVA")
    if "mrope_section" in (getattr(decoder, "rope_parameters", None) or {}):
        raise UserError(
            f"{by} hides columns of a model with plain positions, and {type(model).__name__} has axes of time, height "
            "and width (M-RoPE); give a model as LLaVA"
        )
    found: Tensor = ids[0] == token
    if not bool(found.any()):
        raise UserError(
            f"{by} finds no image in the prompt: give one, as manyheads.reply(model, processor, prompt, ..., "
            "image=picture)"
        )
    return found


class Streams:
    """Readings of one prompt side by side; made, they have read all of it but the last token.

    Args:
        model: reads images, in evaluation mode.
        ids: ``[1, T]`` of the prompt.
        seen: which of its columns each reading sees, bool ``[S, T]``, the first among them.
        given: what else each is given, S mappings.
    """

    def __init__(self, model: nn.Module, ids: Tensor, seen: Tensor, given: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.seen = model, seen
        config: Any = model.config
        cache: Any = DynamicCache(config=config)
        self._held, self._cache = cache, cache_arguments(model, cache)
        self._fed = ids[:, -1:]
        rows = len(seen)
        extra = {name: torch.cat([each[name] for each in given]) for name in given[0]}
        extra = given_with(extra, ids.shape[1] - 1)
        model(input_ids=ids[:, :-1].expand(rows, -1), **extra, **self._masked(ids.shape[1] - 1), **self._cache)
        cache.activate_past_recording()  # a sliding window keeps what a token pushes out until it is sure to stay

    def next(self) -> Tensor:
        """Logits of what follows, float32 ``[S, V]``."""
        fed = self._fed.expand(len(self.seen), 1)
        logits: Tensor = self.model(input_ids=fed, **self._masked(self.seen.shape[1]), **self._cache).logits
        return logits[:, -1].float()

    def again(self) -> Tensor:
        """The same of the same token, which is read anew: what changed about the model since counts from here on."""
        self._held.crop(-1)
        return self.next()

    def append(self, token: int, seen: Tensor) -> None:
        """Go on with a token, that later ones of the readings ``seen [S]`` see."""
        self._held.crop(0)
        self._fed = torch.full_like(self._fed, token)
        self.seen = torch.cat([self.seen, seen[:, None]], 1)

    def _masked(self, width: int) -> dict[str, Tensor]:
        """A mask only where something is hidden: the model's own path otherwise."""
        seen = self.seen[:, :width]
        return {} if bool(seen.all()) else {"attention_mask": seen.long()}
