# SPDX-License-Identifier: Apache-2.0
"""A prompt that hosts share, read at once: how its tokens are predicted, and how near that is to the model alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...experiment import Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ._prefill import token_nll
from ._retaining import RetainingArms
from ._text_task import model_of, tensor

__all__ = ["Passing"]

_AT_ONCE = 1024  # tokens whose logits are in float32 at once


@dataclass(frozen=True, kw_only=True)
class Passing(RetainingArms):
    """Each context is a document of ``lengths`` tokens and ``target`` tokens that follow, in one prompt.

    The last ``target`` tokens are the query where the arm says so: they see the whole document, of which hosts made
    keys and values. The document is judged from ``skipped`` of it on, so that the first host, which is exact, is not.

    Attributes:
        target: last tokens.
        skipped: part of the document that is not judged.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("document_nll", "loss of the document, nats/token", "nats/token"),
        Metric("query_nll", "loss of the last tokens, nats/token", "nats/token"),
        Metric("kl", "last tokens: divergence from the model alone, nats/token", "nats/token"),
        Metric("agreement", "last tokens: likeliest as by the model alone", higher=True, kind="share"),
    )

    target: int = 64
    skipped: float = 0.25

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            unit for length in self.lengths for unit in self.batches(run, length, float(length * len(run.arms)))
        ]  # fmt: skip

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, first, last = (unit.params[name] for name in ("length", "first", "last"))
        model, arms = model_of(run), self.arms_of(run, unit)
        contexts = self.contexts(run).plain("passing", length, self.samples, self.target + 1)[first:last]
        for number, (context, text, _) in enumerate(contexts, first):
            ids = tensor(run, [context[: length + self.target + 1]])
            alone = self._read(model, (), ids)
            for arm in arms:
                found = alone if arm == run.baseline else self._read(model, arm.strategies, ids)
                for metric, value in self._judged(found, alone, ids).items():
                    yield self.row(
                        metric, arm, value, f"{length}-{number}", at={"length": length}, about={"text": text}
                    )  # fmt: skip
                run.advance(unit.cost / len(arms) / len(contexts))

    @staticmethod
    def _read(model: Any, strategies: Any, ids: Tensor) -> Tensor:
        """Logits ``[1, T, V]`` of all tokens but the last."""
        with ExitStack() as stack:
            if strategies:
                stack.enter_context(use(model, *strategies))
            logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
        return logits

    def _judged(self, logits: Tensor, alone: Tensor, ids: Tensor) -> dict[str, float]:
        size = logits.shape[1] - self.target
        parts = zip(logits[:, :size].split(_AT_ONCE, 1), ids[:, 1 : size + 1].split(_AT_ONCE, 1), strict=True)
        document = torch.cat([token_nll(x.float(), wanted) for x, wanted in parts], 1)
        last, other = logits[:, size:].float(), alone[:, size:].float()
        wide = other.log_softmax(-1)
        return {
            "document_nll": float(document[:, int(self.skipped * size) :].mean()),
            "query_nll": float(token_nll(last, ids[:, size + 1 :]).mean()),
            "kl": float((wide.exp() * (wide - last.log_softmax(-1))).sum(-1).mean()),
            "agreement": float((last.argmax(-1) == other.argmax(-1)).float().mean()),
        }
