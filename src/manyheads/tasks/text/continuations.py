# SPDX-License-Identifier: Apache-2.0
"""What a model writes after prose: how likely it finds it, how much its texts repeat one another, how human it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ...integrations.decoding import end_tokens, write_each
from ...integrations.transformers import new_cache, prefill
from ...questions import split
from ...spec import parse
from ...writing import Decoding, Request
from .._embedded import embedded_texts
from ._frontier import Rows, pseudo_values
from ._prefill import token_nll
from ._reader import reader
from ._text_task import TextTask, model_of, tensor
from ._written import cells, distinct, mauve, self_bleu

__all__ = ["Continuations"]


@dataclass(frozen=True, kw_only=True)
class Continuations(TextTask):
    """Texts of an arm after each context, ``copies`` of them; an arm that draws nothing writes the likeliest tokens.

    The loss is that of the plain model. MAUVE is of cells of MiniLM embeddings, and windows of what follows in the text
    stand for what people write; its values are the jackknife's, of which each context has one. A text that ends at once
    has no loss and is left out.

    Attributes:
        tokens: of a text, at most.
        copies: texts of each context.
        encoder: of embeddings, see :func:`manyheads.models.load_reader`; empty leaves MAUVE away.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "nll", "loss of what is written", "nats/token", what="by the plain model: how likely it finds its own text"
        ),
        Metric(
            "self_bleu", "self-BLEU", what="of the texts of one context, each beside the others: 1 where all are one"
        ),
        Metric("distinct", "distinct bigrams", higher=True, kind="share", what="of all that was written on a context"),
        Metric(
            "mauve", "MAUVE beside what people wrote", higher=True, what="by cells of MiniLM embeddings, 1 if alike"
        ),
    )

    lengths: tuple[int, ...] = (64,)
    tokens: int = 32
    copies: int = 4
    encoder: str = "all-minilm-l6-v2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.copies < 2:
            raise UserError("continuations have 1 token or more, and 2 copies or more to be compared")

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.samples * (self.lengths[-1] + self.copies * self.tokens))
        return [WorkUnit(self.key, arm.key, cost, f"{arm.key}: continuations", {"arm": arm.key}) for arm in run.arms]

    def measure(self, run: RunContext, unit: WorkUnit) -> list[Row]:
        with torch.inference_mode():
            return list(self.rows(run, unit))

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, ids, length = run.arm_of(unit), self._ids(run), self.lengths[-1]
        texts = self._written(run, arm, ids[:, : -self.copies * self.tokens])
        at, names = {"length": length}, list(range(len(texts)))
        for i, (own, context) in enumerate(zip(texts, ids, strict=True)):
            said = [text for text in own if text]
            yield self.row("self_bleu", arm, self_bleu(own), f"{i}", at=at)
            yield self.row("distinct", arm, distinct(own), f"{i}", at=at)
            if said:
                yield self.row("nll", arm, self._nll(run, context[: -self.copies * self.tokens], said), f"{i}", at=at)
        if self.encoder:
            human = ids[:, -self.copies * self.tokens :].reshape(len(ids), self.copies, -1).tolist()
            model, reads = reader(run, self.encoder)
            tokenizer = cast(Any, cast(CausalLM, run.subject).tokenizer)
            said_by = [tokenizer.decode(text) for many in (human, texts) for own in many for text in own]
            count = max(2, len(said_by) // 20)
            own_cells = cells(embedded_texts(model, reads, said_by), count).view(2, len(texts), self.copies)
            table = torch.nn.functional.one_hot(own_cells, count).sum(2).double().numpy()

            def read(rows: Rows) -> Any:
                return np.asarray(mauve(*table[:, rows].sum(1)))

            for i, value in zip(names, pseudo_values(read, len(texts)), strict=True):
                yield self.row("mauve", arm, value, f"{i}", at=at)

    def _written(self, run: RunContext, arm: Arm, ids: Tensor) -> list[list[list[int]]]:
        model = model_of(run)
        acting, keeping = split(arm.strategies)
        choosing = [strategy for strategy in acting if isinstance(strategy, Decoding)]

        def fresh(some: Tensor) -> Any:
            cache = new_cache(model, keeping)
            prefill(model, some, cache)
            return cache

        ends = end_tokens(model, cast(CausalLM, run.subject).tokenizer)
        chooser = choosing[0] if choosing else cast(Decoding, parse("sampling:top_k=1"))
        seed = int(run.rng(written=arm.key).integers(2**31))
        with use(model, *(strategy for strategy in acting if strategy not in choosing)):
            made = [
                write_each(chooser, Request(model, None, part, self.tokens, ends, seed + i), self.copies, fresh)[0]
                for i, part in enumerate(ids.split(1))
            ]
        return [[text.tokens for text in own] for own in made]

    def _nll(self, run: RunContext, context: Tensor, texts: list[list[int]]) -> float:
        found = []
        for text in texts:
            whole = torch.cat([context, context.new_tensor(text)])[None]
            logits = model_of(run)(input_ids=whole[:, :-1]).logits[:, -len(text) :].float()
            found.append(float(token_nll(logits, whole[:, -len(text) :]).mean()))
        return sum(found) / len(found)

    def _ids(self, run: RunContext) -> Tensor:
        """Contexts and what follows each, ``[C, length + copies * tokens]``."""
        drawn = self.contexts(run).plain(self.name, self.lengths[-1], self.samples, self.copies * self.tokens)
        return tensor(run, [ids for ids, _, _ in drawn])
