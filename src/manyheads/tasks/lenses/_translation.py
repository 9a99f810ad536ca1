# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train a small translation model first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...data.translations import Pair
from ...experiment import RunContext, WorkUnit, seeding
from ...models.translator import batches, new_tokenizer, new_translator, translation_loss
from ...training import TrainState, decay, fit, optimizers_of
from ._trained import TrainedTask, told

__all__ = ["TranslationTask"]


@dataclass(frozen=True, kw_only=True)
class TranslationTask(TrainedTask):
    """Base of tasks on a translation model, trained once for all arms of a seed.

    Attributes:
        vocab, dim, layers, heads: of the model.
        batch: pairs of a step.
        lr: highest learning rate.
    """

    apart: ClassVar[bool] = False

    vocab: int = 6000
    dim: int = 256
    layers: int = 3
    heads: int = 4
    batch: int = 128
    steps: int = 3000
    lr: float = 2e-3

    def trained(
        self, run: RunContext, unit: WorkUnit, train: Sequence[Pair], seed: int, early: float = 0.0
    ) -> tuple[Any, list[Any]]:
        """The tokenizer, and the model at its end, behind that at ``early`` of its training where that is above 0."""
        tokenizer = run.kept(
            ("tokens", self.vocab, train[0]), lambda: new_tokenizer([x for pair in train for x in pair], self.vocab)
        )
        torch.manual_seed(seeding.number(run.seed, weights="translation", seed=seed))
        model = new_translator(len(tokenizer), self.dim, self.layers, self.heads).to(run.device)
        kept: list[Any] = []
        tell = told(run, unit, self.steps)

        def on_step(state: TrainState) -> None:
            tell(state)
            if early and state.step == max(1, int(early * self.steps)):
                kept.append(copy.deepcopy(model).eval())

        fit(
            model, batches(tokenizer, train, self.batch, seed, run.device), translation_loss, budget=self.steps,
            optimizers=optimizers_of(model, self.lr, weight_decay=0.01),
            schedule=decay("linear", warmup=max(1, self.steps // 8)), on_step=on_step,
        )  # fmt: skip
        return tokenizer, [*kept, model]
