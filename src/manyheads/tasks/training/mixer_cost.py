# SPDX-License-Identifier: Apache-2.0
"""What a decoder remembers after so many tokens, and what the next one costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...experiment import Metric, Row, RunContext, WorkUnit
from ...training.fit import autocast
from ._decoders import UntrainedTask, now

__all__ = ["MixerCost"]

_WARM, _TIMED = 2, 10  # tokens decoded before and under the clock
_CHUNK = 512  # tokens of a context that are read at once


@dataclass(frozen=True, kw_only=True)
class MixerCost(UntrainedTask):
    """Reads on from one length to the next, and decodes at each, all arms in turn token by token.

    Attributes:
        lengths: tokens read, ascending.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("state", "state of a sequence, bytes", "bytes"),
        Metric("decode", "token, ms", "ms", kind="time"),
    )

    lengths: tuple[int, ...] = (256, 1024, 4096)

    def cost(self, run: RunContext) -> float:
        return 0.5 * self.lengths[-1] * len(self.measured(run))

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        models, arms = self.models(run), self.measured(run)
        longest = self.lengths[-1] + len(self.lengths) * (_WARM + _TIMED)
        ids = torch.randint(self.vocab, (1, longest), generator=run.torch_rng(tokens=longest)).to(run.device)
        states: dict[str, Any] = dict.fromkeys(models)
        read = before = 0
        for model in models.values():
            model.eval()
        for length in self.lengths:
            with torch.no_grad(), autocast(run.device):
                for arm in arms:
                    for part in ids[:, read:length].split(_CHUNK, 1):
                        _, states[arm.key] = models[arm.key](part, state=states[arm.key])
                passed = self._decoded(run, models, states, ids[:, length : length + _WARM + _TIMED])
            for arm in arms:
                held = float(sum(state.nbytes for state in states[arm.key]))
                yield self.row("state", arm, held, "0", at={"length": length}, bytes=held)
                yield from self.each("decode", arm, passed[arm.key], at={"length": length})
            read = length + _WARM + _TIMED
            run.advance(0.5 * (length - before) * len(arms))
            before = length

    def _decoded(
        self, run: RunContext, models: dict[str, Any], states: dict[str, Any], ids: Any
    ) -> dict[str, list[float]]:
        """Milliseconds of each of the tokens ``ids [1, N]`` but the first, by arm."""
        arms = list(models)
        found: dict[str, list[float]] = {arm: [] for arm in arms}
        for i in range(ids.shape[1]):
            turn = i % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                start = now(run)
                _, states[arm] = models[arm](ids[:, i : i + 1], state=states[arm])
                if i >= _WARM:
                    found[arm].append(1000 * (now(run) - start))
        return found
