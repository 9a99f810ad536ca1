# SPDX-License-Identifier: Apache-2.0
"""How long work on a device takes, and what the device reaches at best."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter, thread_time
from typing import Any

import torch

from ..attention.mla import Platform

__all__ = ["Clock"]


class Clock:
    """Seconds of work on a device.

    On a GPU they are the device's own: work is queued behind a long product, so that gaps of the launching host do not
    count. On a CPU they are the wall's or, where ``own``, the processor time of this thread: other processes do not
    count, and neither do other threads, so that it wants work of one.
    """

    def __init__(self, device: torch.device, own: bool = False) -> None:
        self.device, self._now = device, thread_time if own else perf_counter
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._filler = self.draw(8192, 8192) if device.type == "cuda" else None

    def draw(self, *shape: int) -> torch.Tensor:
        """Normal values."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def queue(self) -> None:
        """Keep a GPU busy for milliseconds, so that what comes next is launched before it can start."""
        if self._filler is not None:
            self._filler @ self._filler

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one run of ``work``."""
        if self._filler is None:
            start = self._now()
            work()
            return self._now() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.queue()
        begin.record()
        work()
        end.record()
        self.wait()
        return float(begin.elapsed_time(end)) / 1e3

    def best(self, work: Callable[[], object], runs: int) -> float:
        """The shortest of ``runs``, after one that warms up."""
        work()
        return min(self.seconds(work) for _ in range(runs))

    def calibrate(self) -> Platform:
        """What this machine reaches: one large product, one long copy into new memory, one tiny product."""
        gpu = self.device.type == "cuda"
        size, length = (8192, 1 << 29) if gpu else (1024, 1 << 24)
        a: Any = self.draw(size, size)
        source, tiny = torch.ones(length, device=self.device, dtype=self.dtype), a[:8, :8].clone()
        copied = 2 * source.numel() * source.element_size()
        return Platform(
            2 * size**3 / self.best(partial(torch.matmul, a, a), 20), copied / self.best(source.clone, 20),
            self.best(partial(torch.matmul, tiny, tiny), 50), fused_heads=gpu,
        )  # fmt: skip

    def rates(self) -> tuple[tuple[float, float, float], ...]:
        """Bytes moved by a copy, ascending, with its bytes/s into memory in use and into new memory, without launches.

        :attr:`manyheads.attention.mla.Platform.rates` of this machine.
        """
        tiny = torch.ones(8, device=self.device, dtype=self.dtype)
        other, found = tiny.clone(), []
        launch = self.best(partial(other.copy_, tiny), 50)
        for power in range(16, 31 if self.device.type == "cuda" else 28, 2):
            source = torch.ones((1 << power) // 2 // tiny.element_size(), device=self.device, dtype=self.dtype)
            target = source.clone()
            runs = 20 if power < 24 else 6
            used, new = (self.best(work, runs) for work in (partial(target.copy_, source), source.clone))
            rate = [2.0**power / max(t - launch, 0.1 * t) for t in (used, new)]
            found.append((2.0**power, rate[0], rate[1]))
        return tuple(found)
