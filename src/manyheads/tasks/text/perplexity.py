# SPDX-License-Identifier: Apache-2.0
"""Loss of the text that follows a context: nats per token, over TARGET tokens fed after compression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext
from ._prefill import Prefix, chunk_size, forward_chunked, token_nll
from ._text_task import TARGET, TextTask, model_of, tensor

__all__ = ["Perplexity"]


@dataclass(frozen=True, kw_only=True)
class Perplexity(TextTask):
    """Mean negative log-likelihood of the text that follows; the first token of it is fed, not judged."""

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("token_nll", "loss, nats/token", "nats/token"),)

    def units(self, run: RunContext) -> list[WorkUnit]:
        self.contexts(run).plain("loss", self.lengths[-1], self.samples, TARGET + 1)  # too short a text is found now
        cost = self.lengths[-1] + TARGET * len(run.arms) * len(self.lengths)
        return list(self.batches(run, self.lengths[-1], cost))

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        """One prefill serves all lengths: it reads on from one to the next."""
        first, last = unit.params["first"], unit.params["last"]
        contexts = self.contexts(run).plain("loss", self.lengths[-1], self.samples, TARGET + 1)[first:last]
        ids = tensor(run, [context for context, _, _ in contexts])
        prefix: Prefix | None = None
        for length in self.lengths:
            if prefix is None:
                prefix = Prefix(model_of(run), ids[:, :length], run.arms)
            else:
                prefix.extend(ids[:, prefix.ids.shape[1] : length])
            fed, targets = ids[:, length : length + TARGET], ids[:, length + 1 : length + TARGET + 1]
            for arm in run.arms:
                with prefix.open(arm) as cache:
                    held = cache.bytes() / len(contexts)
                    logits = forward_chunked(model_of(run), cache, fed, TARGET, chunk_size(arm, length))
                    nll = token_nll(logits, targets).mean(1).tolist()
                for i, (value, (_, text, overlaps)) in enumerate(zip(nll, contexts, strict=True), first):
                    yield self.row(
                        "token_nll", arm, value, f"{i}", at={"length": length}, bytes=held,
                        about={"text": text, "overlaps": overlaps},
                    )  # fmt: skip
                run.advance(unit.cost / len(run.arms) / len(self.lengths))
