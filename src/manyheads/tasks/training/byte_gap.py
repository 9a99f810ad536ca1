# SPDX-License-Identifier: Apache-2.0
"""Loss on files that none has seen, and how much higher it is than on the bytes that were trained on over and over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...training import token_nll
from ._training_task import at_once
from .byte_lm import ByteLM

__all__ = ["ByteGap"]


@dataclass(frozen=True, kw_only=True)
class ByteGap(ByteLM):
    """:class:`ByteLM`, trained on the first ``kept`` bytes alone.

    ``gap`` has a value for each held-out window: its loss less the mean loss of as many windows of those bytes. A small
    gap alone may be a model that has learned little: read it beside ``token_nll``.

    Attributes:
        kept: bytes that are trained on.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        *ByteLM.metrics,
        Metric("gap", "held-out loss less that on trained bytes, nats/byte", "nats/byte"),
    )

    kept: int = 32_768

    def training_fields(self) -> Sequence[str]:
        return (*super().training_fields(), "kept")

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        seen = self._cut(run, "train", self.length + 1, self.samples).to(run.device)
        own = float(token_nll(model, seen, at_once(self.length)).mean())
        for row in super().rows(run, arm, seed, model):
            yield row
            if row.metric == "token_nll" and row.at["times"] == 1:
                yield self.row("gap", arm, row.value - own, row.sample, seed=seed, about={"trained_nll": own})

    def _numbers(self, run: RunContext, part: str, least: int) -> Tensor:
        data = super()._numbers(run, part, least)
        return data[: max(least, self.kept)] if part == "train" else data
