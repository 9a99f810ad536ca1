# SPDX-License-Identifier: Apache-2.0
"""What share of an epoch's frames and tokens is padding, and how large batches are in the same room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...data.bucketing import padding
from ...data.labelled import labelled
from ...domains.speech.speech_efficiency import SpeechEfficiency
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ._digits import corpus

__all__ = ["BatchPadding"]


@dataclass(frozen=True, kw_only=True)
class BatchPadding(Task):
    """Strings of 1 to ``digits`` recordings of the Free Spoken Digit Dataset, spelled in letters; nothing is trained.

    How many words a string has is drawn (:func:`._digits.corpus`), and shares of padding depend on that draw, which is
    ours; recordings and their durations are real.

    Every arm has the same room for a batch with its padding: ``room`` times the longest recording and transcript, which
    is what random batches need so that none is too large. An arm without a strategy has random batches.

    Attributes:
        strings: of an epoch.
        epochs: that are measured, for every seed.
        digits: of a string at most.
        room: of a batch.
        only: names of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("inputs", "padding of inputs", "share of frames"),
        Metric("outputs", "padding of outputs", "share of tokens"),
        Metric("filled", "mean recordings in a batch", "recordings", higher=True),
        Metric("steps", "steps of an epoch", "steps"),
    )

    strings: int = 20000
    epochs: int = 5
    digits: int = 20
    room: int = 4
    only: tuple[str, ...] = ()

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: labelled("fsdd"))

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(
                self.key, f"{arm.key}/{seed}", 1.0, f"{arm.key}: batches of an epoch", {"arm": arm.key, "seed": seed}
            )
            for seed in run.seeds for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        durations, tokens = corpus(self.strings, self.digits)
        room = (self.room * max(durations), self.room * max(tokens))
        for i in range(self.epochs):
            batches = _recipe(arm).epoch(durations, tokens, room, run.rng(epoch=i, seed=seed))
            found = padding(durations, tokens, batches)
            values = {"inputs": found.inputs, "outputs": found.outputs, "filled": found.size, "steps": found.batches}
            for metric, value in values.items():
                yield self.row(metric, arm, float(value), f"epoch {i}", seed=seed)


def _recipe(arm: Arm) -> SpeechEfficiency:
    if not arm.spec:
        return SpeechEfficiency(batching="random")
    if not isinstance(found := arm.strategy, SpeechEfficiency):
        raise UserError(f"{arm.key} makes no batches by length: give speech_efficiency")
    return found
