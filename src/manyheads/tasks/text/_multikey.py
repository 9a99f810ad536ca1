# SPDX-License-Identifier: Apache-2.0
"""Contexts with several constants and aliases of some: RULER's multikey needles and variable tracking ask the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...experiment.rows import Row, WorkUnit
from ...experiment.task import RunContext
from ._contexts import ALIASES, CONSTANTS, Question
from ._prefill import Prefix, chunk_size, sequences_at_once
from ._text_task import TextTask, answers, model_of, per_token, tensor

__all__ = ["Multikey"]


@dataclass(frozen=True, kw_only=True)
class Multikey(TextTask):
    """Base of tasks that ask several questions of a context; 1 if all tokens of an answer are the likeliest, 0 else.

    Questions come after compression; all of one size go through as one batch.
    """

    asks: ClassVar[str]  # which questions of a context

    def unsupported_reason(self, run: RunContext) -> str | None:
        lines = CONSTANTS + ALIASES
        return super().unsupported_reason(run) or self.contexts(run).unsupported_reason(lines, self.lengths[-1])

    def units(self, run: RunContext) -> list[WorkUnit]:
        return list(self.batches(run, self.lengths[-1], self.lengths[-1] + 40 * len(run.arms), sequences=4))

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, first, last = (unit.params[name] for name in ("length", "first", "last"))
        contexts = self.contexts(run).multikey(length)[first:last]
        ids = [context.ids for context in contexts]
        # The other task asks the same contexts: what was read for it, in this process, serves again.
        prefix: Prefix = run.kept_last(
            "multikey", (length, first, last), lambda: Prefix(model_of(run), tensor(run, ids), run.arms)
        )
        at_once = sequences_at_once(run.device, length, per_token(run))
        sizes: dict[tuple[int, int], list[tuple[int, Question]]] = {}
        for i, context in enumerate(contexts):
            for question in (q for q in context.questions if q.task == self.asks):
                sizes.setdefault((len(question.question), len(question.answer)), []).append((i, question))
        groups = [group[i : i + at_once] for group in sizes.values() for i in range(0, len(group), at_once)]
        for arm in run.arms:
            for group in groups:
                with prefix.open(arm) as cache:
                    held = cache.bytes() / len(contexts)
                    cache.reorder_cache(torch.tensor([i for i, _ in group], device=run.device))
                    fed = tensor(run, [question.question for _, question in group])
                    wanted = tensor(run, [question.answer for _, question in group])
                    right, nats = answers(run, cache, fed, wanted, chunk_size(arm, length))
                for (i, question), value, cost in zip(group, right, nats, strict=True):
                    context = contexts[i]
                    yield self.row(
                        self.metrics[0].name, arm, value, f"{first + i}.{context.questions.index(question)}",
                        context=f"{first + i}", at={"length": length, "depth": question.depth}, bytes=held,
                        about={"nats": cost, "text": context.text, "overlaps": context.overlaps},
                    )  # fmt: skip
            run.advance(unit.cost / len(run.arms))
