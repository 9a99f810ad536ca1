# SPDX-License-Identifier: Apache-2.0
"""Tasks that read a context, compress it, and judge every token of what is fed behind it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...experiment import Row, RunContext, WorkUnit
from ...experiment.rows import Value
from ._prefill import Prefix, chunk_size, forward_chunked
from ._text_task import TextTask, model_of, tensor

__all__ = ["FedTask", "Judged"]

Judged = tuple[str, Mapping[str, Value], list[float]]


@dataclass(frozen=True, kw_only=True)
class FedTask(TextTask):
    """Base: contexts in variants of equal length, each with the tokens that are fed behind it and judged."""

    fed: int

    @abstractmethod
    def drawn(self, run: RunContext, length: int) -> dict[str, list[tuple[Any, Any]]]:
        """By variant, a context of ``length`` tokens and what is fed behind it, of one length, for each sample."""

    @abstractmethod
    def judged(self, variant: str, logits: Tensor, fed: Tensor) -> Iterator[Judged]:
        """Metric, condition and a value for each row, from ``logits [B, F - 1, V]`` of ``fed [B, F]`` but its last."""

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.fed * len(run.arms))
        return [unit for length in self.lengths for unit in self.batches(run, length, length + cost)]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, first, last = (unit.params[name] for name in ("length", "first", "last"))
        arms, drawn = self.arms_of(run, unit), self.drawn(run, length)
        for variant, samples in drawn.items():
            chosen: Sequence[tuple[Any, Any]] = samples[first:last]
            prefix = Prefix(model_of(run), tensor(run, [context for context, _ in chosen]), arms)
            fed = tensor(run, [tail for _, tail in chosen])
            for arm in arms:
                with prefix.open(arm) as cache:
                    held, step = cache.bytes() / len(chosen), chunk_size(arm, length)
                    logits = forward_chunked(model_of(run), cache, fed[:, :-1], fed.shape[1] - 1, step)
                for metric, at, found in self.judged(variant, logits, fed):
                    for i, value in enumerate(found, first):
                        conditions = {"length": length, **at}
                        yield self.row(metric, arm, value, f"{length}-{i}", at=conditions, bytes=held)
                run.advance(unit.cost / len(arms) / len(drawn))
