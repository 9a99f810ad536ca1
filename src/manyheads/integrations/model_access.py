# SPDX-License-Identifier: Apache-2.0
"""A model of transformers, for strategies that write by a loop of their own (``writing.ModelAccess``)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..lens import max_positions
from ..strategy import Strategy
from . import use
from .cache import cache_arguments
from .masked_diffusion import TokenDenoiser
from .shared_blocks import SharedBlocks
from .streams import Streams, image_columns

__all__ = ["Access"]


class Access:
    """See :class:`manyheads.writing.ModelAccess`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def max_positions(self) -> int | None:
        return max_positions(getattr(self.model, "config", None))

    def use(self, *strategies: Strategy) -> AbstractContextManager[Any]:
        return use(self.model, *strategies)

    def reader(self, cache: Any) -> Callable[[Tensor], Tensor]:
        given = cache_arguments(self.model, cache)

        def read(fed: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=fed, **given).logits
            return logits[:, -1].float()

        return read

    def image_columns(self, ids: Tensor, by: str) -> Tensor:
        return image_columns(self.model, ids, by)

    def readings(self, ids: Tensor, seen: Tensor, given: Sequence[Mapping[str, Tensor]]) -> Streams:
        return Streams(self.model, ids, seen, given)

    def blocks(self) -> SharedBlocks:
        return SharedBlocks(self.model)

    def masked_lm(self) -> TokenDenoiser:
        return TokenDenoiser(self.model)
