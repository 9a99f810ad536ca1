# SPDX-License-Identifier: Apache-2.0
"""Whether a byte language model completes a constant that was planted in what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...training import token_nll
from ..text._contexts import Contexts
from ._bytes import Bytes
from .byte_lm import ByteLM

__all__ = ["PlantedConstant"]


@dataclass(frozen=True, kw_only=True)
class PlantedConstant(ByteLM):
    """The models of ``byte_lm``, asked for a constant planted in text of the trained length.

    ``completed`` is 1 where every byte of the answer is the likeliest; ``answer_nll`` is the loss on its bytes, of
    which a guess at a digit costs ln 10 = 2.30.
    """

    reports: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("completed", "planted constants completed", higher=True, kind="share"),
        Metric("answer_nll", "loss on planted constants, nats/byte", "nats/byte"),
    )

    def unsupported_reason(self, run: RunContext) -> str | None:
        return self._contexts(run).unsupported_reason(1, self.length)

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        contexts = self._contexts(run)
        size = contexts.inserter.answer_size
        planted = contexts.single(self.length - contexts.inserter.question_size - size)
        asked = [[*context.ids, *context.questions[0].question, *context.questions[0].answer] for context in planted]
        fed = torch.tensor(asked, device=run.device)
        right = (model(fed[:, :-1])[0][:, -size:].argmax(-1) == fed[:, -size:]).all(1).tolist()
        cost = token_nll(model, fed)[:, -size:].mean(1).tolist()
        for i, context in enumerate(planted):
            at = {"depth": context.questions[0].depth}
            about = {"text": context.text, "overlaps": context.overlaps}
            yield self.row("completed", arm, right[i], f"{i}", seed=seed, at=at, about=about)
            yield self.row("answer_nll", arm, cost[i], f"{i}", seed=seed, at=at, about=about)

    def _contexts(self, run: RunContext) -> Contexts:
        def make() -> Contexts:
            return Contexts(self._held_out(run), Bytes(), self.samples, run.seed)

        return cast(Contexts, run.kept(("planted", self.text, self.samples), make))
