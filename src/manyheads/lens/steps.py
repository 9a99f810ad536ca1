# SPDX-License-Identifier: Apache-2.0
"""Values of every step of a generation, in memory that does not grow: a window of the latest steps."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["Steps"]


class Steps:
    """The latest steps of each prompt, ``[N, steps, ...]`` by blocks as they came.

    Blocks leave a GPU as they come, by copies that nobody waits for, so that nothing of them is held there.

    Args:
        keep: steps that are kept; older ones are forgotten.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.parts: list[deque[Tensor]] = []
        self.forgotten: list[int] = []

    def add(self, values: Tensor, fresh: bool) -> None:
        """Add ``values [B, steps, ...]``; ``fresh`` begins new prompts."""
        if fresh or not self.parts:
            self.parts.append(deque())
            self.forgotten.append(0)
        values = values.detach()[:, -self.keep :]
        if values.is_cuda:
            held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = held.copy_(values, non_blocking=True)
        blocks = self.parts[-1]
        blocks.append(values)
        while sum(block.shape[1] for block in blocks) - blocks[0].shape[1] >= self.keep:
            self.forgotten[-1] += blocks.popleft().shape[1]

    def rows(self) -> list[Any]:
        """One float64 array ``[steps, ...]`` for each prompt."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies may be under way
        joined = [torch.cat(list(blocks), 1)[:, -self.keep :] for blocks in self.parts]
        return [row.double().numpy() for part in joined for row in part]
