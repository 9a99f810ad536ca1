# SPDX-License-Identifier: Apache-2.0
"""Whether a score of tokens marks where a model plans and what it comes back to, in a language where both are known.

A small Llama, one to a seed, learns the language of :mod:`manyheads.data.phrases`. An arm is a score, its option
``score``: ``waad``, ``fai``, ``entropy`` of the prediction, or blind draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.phrases import PhraseLanguage as Language
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...training import train_lm
from .._statistics import auroc
from ._rhythm import peaks_of, score_of, scores
from ._trained import TrainedTask, llama, told

__all__ = ["PhraseLanguage"]

_WINDOW = 10  # tokens behind a row that WAAD looks at


@dataclass(frozen=True, kw_only=True)
class PhraseLanguage(TrainedTask):
    """A value for each unseen sequence; the losses are the baseline's, for all arms look at one model.

    Attributes:
        dim, layers: of the model.
        length, batch: of sequences, and sequences of a step.
        sequences: to judge by.
    """

    apart: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("head_auroc", "AUROC of rows that generate the head of a phrase", higher=True),
        Metric("is_head_auroc", "AUROC of rows that are the head of a phrase", higher=True),
        Metric("definitions_found", "definitions looked up later that are among the peaks", higher=True, kind="share"),
        Metric("lookup_loss", "loss of values that are looked up", "nats"),
        Metric("phrase_loss", "loss within phrases", "nats"),
    )

    steps: int = 900
    dim: int = 128
    layers: int = 2
    length: int = 128
    batch: int = 16
    sequences: int = 64

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed, language = unit.params["seed"], Language.of(0)
        model = self._learned(run, unit, language, seed)
        test = language.draw(self.sequences, self.length, run.torch_rng(test="phrase_language"))
        ids = test.ids.to(run.device)
        found, logits = scores(run, model, ids, 1)
        loss = cross_entropy(logits[:, :-1].transpose(1, 2), test.ids[:, 1:], reduction="none").numpy()
        starts, definitions, free = test.starts.numpy(), test.definitions.numpy(), test.free.numpy()
        inside = slice(_WINDOW, self.length - 1)  # rows with a whole window behind them and a token after
        for n in range(self.sequences):
            known = definitions[n] & np.isfinite(found[n]["fai"])
            if not known.any():  # the same sequences for every seed and score
                continue
            uses = test.uses[n, :-1].numpy()
            for name, value in (("lookup_loss", loss[n][uses]), ("phrase_loss", loss[n][~free[n, :-1] & ~uses])):
                yield self.row(name, run.baseline, value.mean(), f"{n}", seed=seed)
            for arm in run.arms:
                score = found[n][score_of(arm)]
                seen = np.isfinite(score[inside])
                for name, label in (("head_auroc", np.roll(starts[n], -1)), ("is_head_auroc", starts[n])):
                    yield self.row(name, arm, auroc(score[inside][seen], label[inside][seen]), f"{n}", seed=seed)
                yield self.row("definitions_found", arm, peaks_of(score)[known].mean(), f"{n}", seed=seed)

    def _learned(self, run: RunContext, unit: WorkUnit, language: Language, seed: int) -> Any:
        def draw(step: int) -> Tensor:
            source = run.torch_rng(train="phrase_language", seed=seed, step=step)
            return language.draw(self.batch, self.length, source).ids.to(run.device)

        model = llama(run, language.vocab, self.dim, self.layers, 8, seed)
        train_lm(model, draw, self.steps, lr=4e-3, weight_decay=0.01, on_step=told(run, unit, self.steps))
        return model
