# SPDX-License-Identifier: Apache-2.0
"""RULER's single needle: a constant planted in a context and asked for, after compression or known before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext
from ._prefill import Prefix, chunk_size
from ._text_task import TextTask, answers, model_of, tensor

__all__ = ["NiahSingle"]


@dataclass(frozen=True, kw_only=True)
class NiahSingle(TextTask):
    """1 if all tokens of the answer are the likeliest, 0 else.

    ``query_agnostic``: the question comes after compression. ``query_aware``: it is read before; its last token is fed
    after, so that the answer too is predicted from what was compressed.

    Attributes:
        only: keys of the arms that are measured, the baseline among them; all when empty.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "query_agnostic",
            "needle, asked after",
            higher=True,
            kind="share",
            floor=0.5,
            what="one fact is planted in the text, and asked for after the strategy has chosen what stays",
        ),
        Metric(
            "query_aware",
            "needle, asked before",
            higher=True,
            kind="share",
            floor=0.5,
            what="the same, but the strategy has read the question before it chooses",
        ),
    )

    only: tuple[str, ...] = ()

    def unsupported_reason(self, run: RunContext) -> str | None:
        return super().unsupported_reason(run) or self.contexts(run).unsupported_reason(1, self.lengths[0])

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [unit for length in self.lengths for unit in self.batches(run, length, length + 20 * len(run.arms))]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, first, last = (unit.params[name] for name in ("length", "first", "last"))
        arms = [arm for arm in self.arms_of(run, unit) if not self.only or arm.key in self.only]
        contexts = self.contexts(run).single(length)[first:last]
        prefix = Prefix(model_of(run), tensor(run, [context.ids for context in contexts]), arms)
        asked = tensor(run, [context.questions[0].question for context in contexts])
        wanted = tensor(run, [context.questions[0].answer for context in contexts])
        for metric in ("query_agnostic", "query_aware"):
            if metric == "query_aware":
                prefix.extend(asked[:, :-1])
                asked = asked[:, -1:]
            for arm in arms:
                with prefix.open(arm) as cache:
                    held = cache.bytes() / len(contexts)
                    right, nats = answers(run, cache, asked, wanted, chunk_size(arm, length))
                for i, context in enumerate(contexts):
                    yield self.row(
                        metric, arm, right[i], f"{length}-{first + i}",
                        at={"length": length, "depth": context.questions[0].depth},
                        bytes=held if metric == "query_agnostic" else None,
                        about={"nats": nats[i], "text": context.text, "overlaps": context.overlaps},
                    )  # fmt: skip
                run.advance(unit.cost / len(arms) / 2)
