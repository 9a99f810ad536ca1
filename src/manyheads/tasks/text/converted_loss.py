# SPDX-License-Identifier: Apache-2.0
"""Loss of a language model on text held out after it was converted, and perhaps trained to recover.

The strategy of an arm is a conversion; an arm without is the model as it is. ``recover`` among the options of an arm
says that it is trained for the task's ``steps``; ``seeded`` that its strategy draws by a field ``seed``, which is then
that of the run. All arms read the same text: one part to calibrate and recover on, one that is judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from ...converter import Converted, Material, convert_model
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ._text_task import model_of

__all__ = ["ConvertedLoss"]


@dataclass(frozen=True, kw_only=True)
class ConvertedLoss(Task):
    """A value for each window held out, and for each seed where an arm draws or is trained.

    Attributes:
        text: a corpus of :mod:`manyheads.data.texts`.
        length: tokens of a window.
        windows: that are judged.
        sequences: of the calibration.
        steps: of the recovery, of the sequences that the strategy says.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "token_nll", "loss of text, nats/token", "nats/token",
            what="how unlikely the model finds text that it was neither calibrated nor trained on",
        ),
        Metric("parameters", "share of the parameters that is left"),
    )  # fmt: skip

    text: str = "prose"
    length: int = 256
    windows: int = 16
    sequences: int = 8
    steps: int = 0

    def __post_init__(self) -> None:
        if min(self.length, self.windows, self.sequences) < 1 or self.steps < 0:
            raise UserError("length, windows and sequences count, 1 or more; steps 0 or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        lm = cast(CausalLM, run.subject)
        return None if lm.tokenizer is not None else f"{lm.name} has no tokenizer, so that it reads no text"

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for arm in run.arms:
            steps = self.steps if "recover" in arm.options else 0
            cost = (len(run.seeds) if steps or "seeded" in arm.options else 1) * (2.0 + 3 * steps)
            found.append(WorkUnit(self.key, arm.key, cost, f"converting: {arm.key}", {"arm": arm.key}))
        return found

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        varies = "recover" in arm.options or "seeded" in arm.options
        found: tuple[list[float], float] | None = None
        for seed in run.seeds:
            if found is None or varies:
                found = self._found(run, arm, seed)
            yield from self.each("token_nll", arm, found[0], seed=seed)
            yield self.row("parameters", arm, found[1], "model", seed=seed)

    def _found(self, run: RunContext, arm: Arm, seed: int) -> tuple[list[float], float]:
        """Loss of each window, and the share of parameters that is left."""
        from ...converter import measured

        if not arm.spec:
            model, material = model_of(run), self.material(run)
            return run.kept("loss of the model", lambda: measured(model, model, material)), 1.0
        made = self.converted(run, arm, seed)
        return list(made.windows.values())[-1], made.parameters[1] / made.parameters[0]

    def converted(self, run: RunContext, arm: Arm, seed: int) -> Converted:
        """What the conversion of an arm makes of the model, trained where the arm says so."""
        strategy: Any = arm.strategy
        if "seeded" in arm.options:
            strategy = dataclasses.replace(strategy, seed=seed)
        return convert_model(
            model_of(run), strategy, self.material(run), recover=self.steps if "recover" in arm.options else None,
            sequences=self.sequences, seed=seed, stages=False,
        )  # fmt: skip

    def material(self, run: RunContext) -> Material:
        """What is read; the same for all arms."""
        found: Material = run.kept((self.text, self.length, self.windows), lambda: self._material(run))
        return found

    def _material(self, run: RunContext) -> Material:
        from ...data.texts import corpus

        return Material.of(corpus(self.text), cast(CausalLM, run.subject).tokenizer, self.length, self.windows)
