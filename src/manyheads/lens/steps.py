# SPDX-License-Identifier: Apache-2.0
"""Values of every step of a generation, in memory that does not grow: a window of the latest steps."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["Steps"]

_ROOM = 256  # steps


class Steps:
    """The latest steps of each prompt, ``[N, steps, ...]`` by blocks as they came.

    Values leave a GPU as they come, by copies that nobody waits for, so that nothing of them is held there.

    Args:
        keep: steps that are kept; older ones are forgotten.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.parts: list[deque[Tensor]] = []
        self.forgotten: list[int] = []
        self._room: Tensor | None = None  # [steps, B, ...] in the host's memory, filled up to _used
        self._used = 0

    def add(self, values: Tensor, fresh: bool) -> None:
        """Add ``values [B, steps, ...]``; ``fresh`` begins new prompts."""
        if fresh or not self.parts:
            self.parts.append(deque())
            self.forgotten.append(0)
        blocks = self.parts[-1]
        blocks.append(self._moved(values.detach()[:, -self.keep :].transpose(0, 1).contiguous()).transpose(0, 1))
        while sum(block.shape[1] for block in blocks) - blocks[0].shape[1] >= self.keep:
            self.forgotten[-1] += blocks.popleft().shape[1]

    def _moved(self, values: Tensor) -> Tensor:
        """A copy of ``values [steps, B, ...]`` in the host's memory, which is taken for many steps at once."""
        count, room = len(values), self._room
        if room is None or room.shape[1:] != values.shape[1:] or len(room) - self._used < count:
            shape = max(_ROOM, count), *values.shape[1:]
            room = self._room = torch.empty(shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._used = 0
        held = room[self._used : self._used + count]
        self._used += count
        return held.copy_(values, non_blocking=True)

    def rows(self) -> list[Any]:
        """One float64 array ``[steps, ...]`` for each prompt."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies may be under way
        joined = [torch.cat(list(blocks), 1)[:, -self.keep :] for blocks in self.parts]
        return [row.double().numpy() for part in joined for row in part]
