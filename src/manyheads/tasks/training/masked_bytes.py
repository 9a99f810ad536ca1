# SPDX-License-Identifier: Apache-2.0
"""Loss of an encoder of each arm on hidden bytes of files that none has seen, by how much it reads around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...models.encoder import Encoder
from ...training import BatchFn, masked_nll, masked_token_loss
from ._bytes import VOCAB
from ._decoders import check_rows
from ._training_task import TRAINING_METRICS, at_once
from .byte_lm import ByteLM

__all__ = ["MASK", "NOT_ASKED", "MaskedBytes"]

MASK = VOCAB  # the token that stands where a byte is hidden
NOT_ASKED = -100


@dataclass(frozen=True, kw_only=True)
class MaskedBytes(ByteLM):
    """Train a masked byte language model of every arm on text: the way to compare mixers that see both sides.

    Of the spans of ``span`` bytes of a window a share is hidden, the same number in every window; the model says what
    stands there, and nothing else counts (SpanBERT's masking, arXiv 1907.10529, with spans of one length on a grid and
    no random replacement). ``masked_nll`` is the loss on the hidden bytes of the middle ``judged`` bytes of held-out
    windows, which are the same however much is read around them: ``times * length`` bytes in all.

    Attributes:
        share: of the bytes that are hidden.
        span: bytes that are hidden together.
    """

    stored: ClassVar[str] = "masked-"
    kind: ClassVar[type[TokenModel]] = Encoder
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("masked_nll", "held-out loss on hidden bytes, nats/byte", "nats/byte"),
        *TRAINING_METRICS,
    )

    share: float = 0.15
    span: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1 or not 1 <= self.span <= self.length // 2:
            raise UserError("a share between 0 and 1 is hidden, in spans of 1 byte to half a sequence")
        if self.batch < 2:
            raise UserError("whether sequences see each other is tried on two of a batch: give a batch of 2 or more")
        if self.reach:
            raise UserError("an encoder's loss is not told by position: no reach")

    @property
    def vocab(self) -> int:
        return VOCAB + 1

    def training_fields(self) -> Sequence[str]:
        return (*super().training_fields(), "share", "span")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return masked_token_loss(model, batch)

    def check(self, model: TokenModel, ids: Tensor, name: str) -> None:
        check_rows(model, ids, name)

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        plain = super().batches(run, seed)

        def get_batch(step: int) -> tuple[Tensor, Tensor]:
            return self.hidden(plain(step)[0][:, :-1], run.torch_rng(hidden=self.span, training=seed, step=step))

        return get_batch

    def validation(self, run: RunContext, model: TokenModel) -> float:
        text = self._cut(run, "validation", self.length, self.validating)
        return self._mean(run, model, *self.hidden(text, run.torch_rng(hidden=self.span, part="tuning")))

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        widest = max(self.times) * self.length
        text, about = self._windows(run, max(self.times))
        generator = run.torch_rng(hidden=self.span, part="test")
        edge = (widest - (self.judged or self.length)) // 2
        middle = text[:, edge : widest - edge]  # has as many hidden bytes in every window
        parts = [self.hidden(x, generator) for x in (middle, text[:, :edge], text[:, widest - edge : widest])]
        asked, left, right = (labels for _, labels in parts)
        ids = torch.cat([parts[1][0], parts[0][0], parts[2][0]], 1)
        labels = torch.cat([torch.full_like(left, NOT_ASKED), asked, torch.full_like(right, NOT_ASKED)], 1)
        for times in self.times:
            length = times * self.length
            first = (widest - length) // 2
            read, asked = (x[:, first : first + length] for x in (ids, labels))
            found = masked_nll(model, read.to(run.device), asked.to(run.device), at_once(length))
            losses = (found.sum(1) / (asked >= 0).sum(1)).tolist()
            yield from self.each("masked_nll", arm, losses, about, seed=seed, at={"times": times})

    def hidden(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is read of ``text [N, T]``, and what stands where it is hidden, -100 elsewhere: each ``[N, T]``."""
        count, length = text.shape
        cells = length // self.span
        shown = torch.rand(count, cells, generator=generator).argsort(1)
        chosen = shown < max(1, round(self.share * cells))
        away = torch.nn.functional.pad(chosen.repeat_interleave(self.span, 1), (0, length - cells * self.span))
        return text.masked_fill(away, MASK), text.masked_fill(~away, NOT_ASKED)

    def _mean(self, run: RunContext, model: TokenModel, ids: Tensor, labels: Tensor) -> float:
        """Mean loss of what is asked for."""
        found = masked_nll(model, ids.to(run.device), labels.to(run.device), at_once(self.length))
        return float(found.sum() / (labels >= 0).sum())
