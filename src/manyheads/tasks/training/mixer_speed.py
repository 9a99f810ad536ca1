# SPDX-License-Identifier: Apache-2.0
"""Time per token of forward and backward by the length of a sequence, equally many tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...training.fit import autocast
from ._decoders import UntrainedTask, now

__all__ = ["MixerSpeed"]

_WARM = 2  # rounds before those that count


@dataclass(frozen=True, kw_only=True)
class MixerSpeed(UntrainedTask):
    """A round is one pass of every arm at every length, on a CPU by one thread.

    Several threads wait for each other where the machine does other things too, for longer than they compute.

    Attributes:
        times: multiples of ``length``.
        tokens: of each pass, a multiple of every length.
        rounds: repetitions.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("token_time", "training, us/token", "us/token", kind="time"),)

    times: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 2048
    rounds: int = 5

    def __post_init__(self) -> None:
        if any(self.tokens % (times * self.length) for times in self.times):
            raise UserError(f"{self.tokens} tokens do not part into sequences of {self.length} and its multiples")

    def cost(self, run: RunContext) -> float:
        return float((self.rounds + _WARM) * len(self.measured(run)) * len(self.times) * self.tokens)

    def read(self, ids: Tensor) -> Tensor:
        """What a model is given of tokens ``ids [B, T]``."""
        return ids

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        models = self.models(run)
        ids = torch.randint(self.vocab, (self.tokens,), generator=run.torch_rng(tokens=self.tokens)).to(run.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for turn in range(self.rounds + _WARM):
                for arm in self.measured(run):
                    for times in self.times:
                        rows = self.read(ids.view(-1, times * self.length))
                        start = now(run)
                        with autocast(run.device):
                            logits, _ = models[arm.key](rows)
                        logits.float().square().mean().backward()
                        passed = 1e6 * (now(run) - start) / self.tokens
                        models[arm.key].zero_grad(set_to_none=True)
                        if turn >= _WARM:
                            yield self.row("token_time", arm, passed, f"{turn - _WARM}", at={"times": times})
                        run.advance(self.tokens)
        finally:
            torch.set_num_threads(threads)
