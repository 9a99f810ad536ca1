# SPDX-License-Identifier: Apache-2.0
"""What a small Llama answers from its prompt, and from its weights, when channels of its attention are damaged.

One to a seed learns :mod:`manyheads.data.recall_and_facts`: to recall one of four pairs of the prompt, and a table of
32 facts, in prompts of one form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.recall_and_facts import VOCAB, facts, recall_and_facts
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...training import decay, fit
from ._trained import TrainedTask, llama, told

__all__ = ["RecallAndFacts"]

KINDS = ("contextual", "fact", "contradicted fact")


@dataclass(frozen=True, kw_only=True)
class RecallAndFacts(TrainedTask):
    """Whether each question is answered rightly, by its kind; every arm's strategy acts on the model of the seed.

    Attributes:
        questions: to judge by.
    """

    apart: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("answered", "questions answered", higher=True, kind="share"),)

    steps: int = 3000
    questions: int = 1024

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        seed = unit.params["seed"]
        model = self._learned(run, unit, seed)
        drawn = recall_and_facts(self.questions, facts(), run.torch_rng(test="recall_and_facts"))
        ids, label, kind = (x.to(run.device) for x in drawn)
        for arm in run.arms:
            with manyheads.use(model, *arm.strategies), torch.no_grad():
                right = _last(model, ids).argmax(-1) == label
            for i, (value, of) in enumerate(zip(right.tolist(), kind.tolist(), strict=True)):
                yield self.row("answered", arm, value, f"{i}", seed=seed, at={"asks": KINDS[of]})

    def _learned(self, run: RunContext, unit: WorkUnit, seed: int) -> Any:
        table = facts()

        def draw(step: int) -> tuple[Tensor, Tensor]:
            source = run.torch_rng(train="recall_and_facts", seed=seed, step=step)
            ids, label, _ = recall_and_facts(64, table, source)
            return ids.to(run.device), label.to(run.device)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return cross_entropy(_last(model, batch[0]), batch[1])

        model = llama(run, VOCAB, 64, 2, 4, seed, intermediate_size=172, tie_word_embeddings=False)
        fit(
            model, draw, loss, budget=self.steps, optimizers=[torch.optim.AdamW(model.parameters(), lr=1e-3)],
            schedule=decay("none", warmup=100), clip=None, bf16=False, on_step=told(run, unit, self.steps),
        )  # fmt: skip
        return model


def _last(model: Any, ids: Tensor) -> Tensor:
    """Logits of the answer, ``[B, V]``."""
    return cast(Tensor, model(ids, use_cache=False, logits_to_keep=1).logits[:, -1])
