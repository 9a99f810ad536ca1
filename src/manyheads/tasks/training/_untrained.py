# SPDX-License-Identifier: Apache-2.0
"""What tasks share that time or weigh decoders as they are built: what their weights are does not matter."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from ...experiment import Arm, RunContext, Task, WorkUnit
from ...models.decoder import Decoder, DecoderConfig
from ._arms import decoder_of

__all__ = ["UntrainedTask", "now"]


@dataclass(frozen=True, kw_only=True)
class UntrainedTask(Task):
    """Base of tasks on decoders with their first weights, all arms in turn: whatever else runs slows them alike.

    Attributes:
        vocab, dim, layers, heads, parameters: of every decoder; 0 parameters for as many as the
            baseline's has with an ordinary feed-forward width.
        length: trained context, which some strategies depend on.
        only: names of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True

    vocab: int = 256
    dim: int = 64
    layers: int = 2
    heads: int = 2
    parameters: int = 0
    length: int = 256
    only: tuple[str, ...] = ()

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "all", self.cost(run), self.name.replace("_", " "))]

    def cost(self, run: RunContext) -> float:
        """Of the one unit, in training tokens."""
        raise NotImplementedError

    def measured(self, run: RunContext) -> list[Arm]:
        """Arms that are measured."""
        arms = [arm for arm in run.arms if not {"weights_of", "optimizer"} & set(arm.options)]
        return [arm for arm in arms if not self.only or arm.name in self.only]

    def models(self, run: RunContext) -> dict[str, Decoder]:
        """A decoder of every arm, by key."""
        config = DecoderConfig(self.vocab, self.dim, self.layers, self.heads, length=self.length)
        return {arm.key: decoder_of(run, arm, config, self.parameters) for arm in self.measured(run)}


def now(run: RunContext) -> float:
    """The time when the device has done its work."""
    run.synchronise()
    return time.perf_counter()
