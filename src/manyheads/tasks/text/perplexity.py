# SPDX-License-Identifier: Apache-2.0
"""Loss of the text that follows a context: nats per token, over tokens fed after compression or while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...errors import UserError
from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext
from ._outliers import check_same, planted, planted_channels, why_no_keys
from ._prefill import Prefix, chunk_size, forward_chunked, token_nll
from ._text_task import TARGET, TextTask, model_of, tensor

__all__ = ["Perplexity"]

_GUARDED = 64  # tokens on which a model with planted channels must be the model


@dataclass(frozen=True, kw_only=True)
class Perplexity(TextTask):
    """Mean negative log-likelihood of the text that follows; the first token of it is fed, not judged.

    Attributes:
        target: tokens that are judged.
        piece: tokens fed at once, the same in all arms, which evict after each as their schedules say; 0 for as many
            as every arm by itself sees as in decoding.
        start: read only so many tokens of a context at once; the others stream in behind them, so that most of the
            text goes through a cache that is full. 0 reads the context whole, and compresses then.
        outliers: factor of key channels that are planted in the model, a power of two, see :mod:`._outliers`; 0 leaves
            the model as it is.
        channels: the same of input channels of linear layers.
        only: keys of the arms that are measured, the baseline among them; all when empty.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "token_nll", "loss, nats/token", "nats/token",
            what="how unlikely the model finds the text that follows; 0.01 nats more are 1 % more perplexity",
        ),
    )  # fmt: skip

    target: int = TARGET
    piece: int = 0
    start: int = 0
    outliers: float = 0.0
    channels: float = 0.0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target < 1 or self.piece < 0 or not 0 <= self.start <= self.lengths[0]:
            raise UserError("target is 1 or more, piece not negative, and start lies within the shortest context")

    def unsupported_reason(self, run: RunContext) -> str | None:
        most = run.subject.max_context  # type: ignore[attr-defined]
        if self.lengths[-1] + self.target > most:
            return f"{run.subject.name} reads {most} tokens, not the {self.lengths[-1] + self.target} that are needed"
        reason = why_no_keys(model_of(run)) if self.outliers else None
        return reason or super().unsupported_reason(run)

    def model(self, run: RunContext) -> Any:
        if not (self.outliers or self.channels):
            return model_of(run)

        def make() -> Any:
            model = model_of(run)
            if self.outliers:
                model = planted(model, self.outliers, run.rng(outliers=self.outliers))
            return planted_channels(model, self.channels, run.rng(channels=self.channels)) if self.channels else model

        return run.kept(("outliers", self.outliers, self.channels), make)

    def guard(self, run: RunContext) -> None:
        super().guard(run)
        if self.outliers or self.channels:
            ids = tensor(run, [self.contexts(run).plain("guard", _GUARDED, 1, 0)[0][0]])
            check_same(model_of(run), self.model(run), ids)

    def units(self, run: RunContext) -> list[WorkUnit]:
        self._texts(run)  # too short a text is found now
        fed = self.target + (self.lengths[-1] - self.start if self.start else 0)
        cost = (self.start or self.lengths[-1]) + fed * len(run.arms) * len(self.lengths)
        return list(self.batches(run, self.lengths[-1], cost))

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        """One prefill serves all lengths: it reads on from one to the next."""
        first, last = unit.params["first"], unit.params["last"]
        arms = [arm for arm in self.arms_of(run, unit) if not self.only or arm.key in self.only]
        contexts, model = self._texts(run)[first:last], self.model(run)
        ids = tensor(run, [context for context, _, _ in contexts])
        prefix: Prefix | None = None
        for length in self.lengths:
            read = self.start or length
            if prefix is None:
                prefix = Prefix(model, ids[:, :read], arms)
            elif not self.start:
                prefix.extend(ids[:, prefix.ids.shape[1] : read])
            following = ids[:, read : length + self.target + 1]
            for arm in arms:
                with prefix.open(arm) as cache:
                    held = cache.bytes()
                    step = self.piece or chunk_size(arm, length) or TARGET
                    nll = _nats(model, cache, following, step)[:, -self.target :].mean(1).tolist()
                    held = (cache.bytes() if self.start else held) / len(contexts)
                for i, (value, (_, text, overlaps)) in enumerate(zip(nll, contexts, strict=True), first):
                    yield self.row(
                        "token_nll", arm, value, f"{i}", at={"length": length}, bytes=held,
                        about={"text": text, "overlaps": overlaps},
                    )  # fmt: skip
                run.advance(unit.cost / len(arms) / len(self.lengths))

    def _texts(self, run: RunContext) -> Any:
        return self.contexts(run).plain("loss", self.lengths[-1], self.samples, self.target + 1)


def _nats(model: Any, cache: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
    """Nats of every token of ``ids [B, T + 1]`` but the first, ``[B, T]``; ``step`` are fed at once.

    A piece's logits are gone before the next piece: those of a long text would not fit.
    """
    fed, targets = ids[:, :-1].split(step, 1), ids[:, 1:].split(step, 1)
    nats = [
        token_nll(forward_chunked(model, cache, piece, piece.shape[1]), wanted)
        for piece, wanted in zip(fed, targets, strict=True)
    ]
    return torch.cat(nats, 1)
