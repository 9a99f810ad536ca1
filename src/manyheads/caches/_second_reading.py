# SPDX-License-Identifier: Apache-2.0
"""Policies that score the tokens of a prompt by what the model reads behind it, before anything is dropped."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..call import AttentionCall
from ._policy import CachePolicy

__all__ = ["Rereading"]


@dataclass(frozen=True, kw_only=True)
class Rereading(CachePolicy):
    """Base: the model reads on behind the prompt, and nothing of that stays."""

    dense_prefill: ClassVar[bool] = False
    rereads: ClassVar[bool] = True

    @abstractmethod
    def second_reading(self, ids: Tensor, encode: Callable[[str], list[int]]) -> Iterator[tuple[slice, Tensor]]:
        """What is read behind the prompt ``ids [B, L]``: columns that are scored by it, and tokens ``[B, T]``.

        ``encode`` gives the tokens of a text, and raises UserError where the model has no tokenizer.
        """

    @abstractmethod
    def reconstruct(self, call: AttentionCall, columns: slice, state: dict[str, Tensor]) -> None:
        """Score ``columns`` by a forward of :meth:`second_reading`, whose T tokens are the last keys of ``call``."""
