# SPDX-License-Identifier: Apache-2.0
"""How far an encoder's embeddings move when its attention is computed another way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ...errors import UserError, refusal
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ._reader import embedded, long_texts, reader, whole

__all__ = ["EmbeddingFidelity"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingFidelity(Task):
    """Embeddings of whole texts under every arm, beside those of the model as it is, which is the baseline.

    Embeddings are the mean of the last hidden states, of length 1. ``embedding_error`` is the distance of a text's two
    embeddings, in [0, 2]; ``agreement`` the rank correlation (Spearman) of its cosines with all other texts under the
    arm and under the model as it is. Nothing is trained.

    Attributes:
        model: an encoder, see :func:`manyheads.models.load_reader`.
        length: tokens of a text, special ones included.
        samples: texts.
        text: a corpus of :mod:`manyheads.data.texts`.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("embedding_error", "distance from the exact embedding"),
        Metric("agreement", "rank correlation of cosines with the exact ones", higher=True),
    )

    model: str = "all-minilm-l6-v2"
    length: int = 512
    samples: int = 64
    text: str = "brown"

    def __post_init__(self) -> None:
        if self.samples < 3:
            raise UserError("ranks of one other text say nothing: give 3 samples or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: self._texts(run))

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.samples * self.length)
        return [WorkUnit(self.key, arm.key, cost, f"{arm.key}: embeddings", {"arm": arm.key}) for arm in run.arms]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, (model, _), ids = run.arm_of(unit), reader(run, self.model), self._texts(run).to(run.device)
        exact = cast(Tensor, run.kept(("embeddings", self.model, self.length), lambda: embedded(model, ids)))
        found = exact
        if arm.strategies:
            with use(model, *arm.strategies):
                found = embedded(model, ids)
        yield from self.each("embedding_error", arm, (found - exact).norm(dim=1).tolist())
        yield from self.each("agreement", arm, rank_correlations(found, exact).tolist())

    def _texts(self, run: RunContext) -> Tensor:
        def make() -> Tensor:
            tokenizer, body = reader(run, self.model)[1], self.length - 2
            texts = long_texts(run, tokenizer, self.text, body, self.samples, run.rng(embedded=self.text))
            return whole(tokenizer, [ids[:body] for ids in texts[: self.samples]])

        return cast(Tensor, run.kept(("texts", self.text, self.samples, self.length), make))


def rank_correlations(found: Tensor, exact: Tensor) -> Tensor:
    """Of each text's cosines with all others, by embeddings ``[N, dim]`` of length 1: ``[N]``."""
    count = len(found)
    others = ~torch.eye(count, dtype=torch.bool, device=found.device)
    ranks = [(x @ x.T)[others].view(count, -1).argsort(1).argsort(1).double() for x in (found, exact)]
    one, other = (x - x.mean(1, keepdim=True) for x in ranks)
    found_in: Tensor = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    return found_in
