# SPDX-License-Identifier: Apache-2.0
"""What the tasks of one run share: model, contexts, arms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..integrations.cache import StoreLayer
from ..integrations.transformers import new_cache
from ..spec import parse
from ..tasks.text._contexts import Contexts
from ..tasks.text._corpus import Ids
from .arms import BASELINE, Arm, forward_chunked

__all__ = ["TARGET", "Bench", "Row", "Unit"]

Row = dict[str, Any]

TARGET = 64  # tokens that the loss of a context is judged on
_CACHE_LIMIT = 2**30  # bytes of dense cache that one batch may hold
_CACHE_SHARE = 32  # on a GPU: this part of its memory
_FORGETS = 0.1  # difference of logits, in their standard deviation, beyond what rounding does


@dataclass(frozen=True)
class Unit:
    """What is measured and written at once: contexts ``first`` to ``first + count`` of a task at a length."""

    task: str
    length: int
    first: int = 0
    count: int = 1
    cost: float = 1.0  # tokens through the model, for the progress display

    @property
    def name(self) -> str:
        return f"{self.task}/{self.length}/{self.first}"

    @property
    def label(self) -> str:
        """What the progress display says."""
        return f"{self.task}, {self.length} tokens"


@dataclass
class Bench:
    """Model, contexts and arms of a run; ``tick`` hears of work done."""

    model: nn.Module
    contexts: Contexts
    arms: list[Arm]
    tasks: Sequence[str]
    lengths: Sequence[int]
    tick: Callable[[float], None] = lambda done: None
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device

    def bytes_per_token(self) -> float:
        """Bytes that a token takes in a cache to fork from, what does not grow with the text left out.

        The port must be open. Raises UserError for a model without a cache, with one that ours cannot stand in for, or
        that does not read on where it stopped.
        """
        ids, held = torch.arange(16, device=self.device)[None], []
        for length in (8, 16):
            cache = new_cache(self.model, parse(BASELINE), record=1)
            try:
                last = forward_chunked(self.model, cache, ids[:, :length], 8)
            except UserError:
                raise
            except ValueError as error:  # of a model with a kind of cache of its own
                raise UserError(f"{type(self.model).__name__} does not take a cache of ours: {error}") from error
            held.append(cache.bytes())
        if held[0] == held[1]:
            raise UserError(f"{type(self.model).__name__} keeps no key/value cache, so there is nothing to compare")
        if not all(isinstance(layer, StoreLayer) for layer in cache.layers):
            cache = new_cache(self.model, parse(BASELINE))
            again = forward_chunked(self.model, cache, ids, 8, 8)
            if (again - last).norm() > _FORGETS * last.std() * last.numel() ** 0.5:
                raise UserError(
                    f"{type(self.model).__name__} forgets its states when it reads several tokens after others, in "
                    "transformers itself, so that no figure would be right"
                )
        return (held[1] - held[0]) / 8

    def rows_at_once(self, length: int, per_token: float) -> int:
        """Sequences of ``length`` tokens whose dense caches are held at once."""
        limit = _CACHE_LIMIT
        if self.device.type == "cuda":
            limit = torch.cuda.get_device_properties(self.device).total_memory // _CACHE_SHARE
        return max(1, int(limit // (length * per_token)))

    def tensor(self, rows: Sequence[Sequence[int] | Ids]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(row, np.int64) for row in rows])).to(self.device)

    def synchronise(self) -> None:
        """Wait for the device, so that a clock read next is right."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
