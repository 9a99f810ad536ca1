# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall (Zoology, arXiv 2312.04927): the share of values that a trained model looks up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...data.synthetic import associative_recall, guessed_recall
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...training import BatchFn, token_nll
from ._training_task import TRAINING_METRICS, TrainingTask, at_once

__all__ = ["AssociativeRecall"]

_CALIBRATING = 4  # sequences


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(TrainingTask):
    """Pairs of key and value, then the keys again in another order; nothing but looking up helps.

    A sequence's value is the share of its values that are likeliest; longer ones have more filler between questions.
    The floor is what the best guess reaches that knows which values stand in the sequence and which were said since,
    and not the keys (:func:`manyheads.data.synthetic.guessed_recall`): .57 of four pairs.

    Attributes:
        pairs: of key and value in a sequence.
        tokens: of the vocabulary.
    """

    stored: ClassVar[str] = "recall-"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("recalled", "values recalled", higher=True, kind="share", floor=guessed_recall(4, 16)),
        *TRAINING_METRICS,
    )

    length: int = 32
    layers: int = 2
    batch: int = 64
    samples: int = 256
    pairs: int = 4
    tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 4:
            raise UserError("with fewer than four pairs a guess among the values looks like recall: give 4 or more")

    @property
    def vocab(self) -> int:
        return self.tokens

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.floored(recalled=guessed_recall(self.pairs, self.tokens - 1 - (self.tokens - 1) // 2))

    def training_fields(self) -> Sequence[str]:
        return ("pairs", "tokens", "samples")

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        def get_batch(step: int) -> tuple[Tensor, Tensor]:
            return self._drawn(run, self.batch, 1, training=seed, step=step)

        return get_batch

    def validation(self, run: RunContext, model: TokenModel) -> float:
        ids, judged = self._drawn(run, self.samples, 1, part="tuning")
        return float(token_nll(model, ids.to(run.device), at_once(self.length))[judged].mean())

    def calibrating(self, run: RunContext) -> Tensor:
        return self._drawn(run, _CALIBRATING, max(self.times), part="calibration")[0][:, :-1].to(run.device)

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        for times in self.times:
            ids, judged = self._drawn(run, self.samples, times, part="test")
            parts = ids.to(run.device).split(at_once(times * self.length))
            best = torch.cat([model(rows[:, :-1])[0].argmax(-1).cpu() for rows in parts])
            right = ((best == ids[:, 1:]) & judged).sum(1) / judged.sum(1)
            yield from self.each("recalled", arm, right.tolist(), seed=seed, at={"times": times})

    def _drawn(self, run: RunContext, count: int, times: int, **axes: str | int) -> tuple[Tensor, Tensor]:
        generator = run.torch_rng(recall=self.pairs, times=times, **axes)
        return associative_recall(count, times * self.length, self.pairs, self.tokens, generator)
