# SPDX-License-Identifier: Apache-2.0
"""Key-value pairs in real text: what a byte language model looks up, beside what it loses on the text itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...data.synthetic import associative_recall, guessed_recall
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...training import BatchFn, token_nll
from ._bytes import VOCAB
from ._training_task import TRAINING_METRICS, at_once
from .byte_lm import ByteLM

__all__ = ["RecallInText"]


@dataclass(frozen=True, kw_only=True)
class RecallInText(ByteLM):
    """A byte language model that is also trained to recall: every other sequence of a batch holds pairs.

    Such a sequence is multi-query associative recall (:func:`manyheads.data.synthetic.associative_recall`) whose filler
    is the text, read on around the pairs at its beginning and the questions: keys and values are tokens of their own
    beside the 256 bytes. What counts in training are the bytes of text and the values asked for, these ``weight`` times
    as much. In training a key is asked for ``asked`` times, for a value seen more often is learned sooner; where models
    are judged, once. Longer sequences have more text between the questions. A value of ``recalled`` is the share of a
    sequence's values that are likeliest; the floor is what the best guess reaches that knows which values stand there
    and which were said since, and not the keys (:func:`manyheads.data.synthetic.guessed_recall`): .57 of four pairs.

    Attributes:
        pairs: of key and value in a sequence.
        keys: that there are, and as many values.
        asked: times that a key is asked for in training.
        weight: of a value asked for, in bytes of text.
    """

    stored: ClassVar[str] = "mixed-"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("recalled", "values recalled", higher=True, kind="share", floor=guessed_recall(4, 16)),
        Metric("token_nll", "held-out loss, nats/byte", "nats/byte"),
        Metric("span_nll", "held-out loss by position, nats/byte", "nats/byte"),
        *TRAINING_METRICS,
    )

    pairs: int = 4
    keys: int = 16
    asked: int = 3
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 4:
            raise UserError("with fewer than four pairs a guess among the values looks like recall: give 4 or more")
        if self.batch < 2:
            raise UserError("half of a batch holds pairs, half is text alone: give a batch of 2 or more")

    @property
    def vocab(self) -> int:
        return VOCAB + 2 * self.keys

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.floored(recalled=guessed_recall(self.pairs, self.keys))

    def training_fields(self) -> Sequence[str]:
        return (*super().training_fields(), "pairs", "keys", "asked", "weight")

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        plain = super().batches(run, seed)
        mixed = self.batch // 2

        def get_batch(step: int) -> tuple[Tensor, Tensor]:
            ids, counts = plain(step)[0], torch.ones(self.batch, self.length)
            generator = run.torch_rng(recall=self.pairs, training=seed, step=step)
            ids[:mixed], asked = self._planted(ids[:mixed], generator, self.asked)
            counts[:mixed] = self.weight * asked + (ids[:mixed, 1:] < VOCAB)
            return ids, counts

        return get_batch

    def validation(self, run: RunContext, model: TokenModel) -> float:
        ids = self._cut(run, "validation", self.length + 1, self.validating)
        mixed, asked = self._planted(ids, run.torch_rng(recall=self.pairs, part="tuning"))
        text, planted = (token_nll(model, x.to(run.device), at_once(self.length)) for x in (ids, mixed))
        counts = self.weight * asked + (mixed[:, 1:] < VOCAB)
        return float((text.sum() + (planted * counts).sum()) / (text.numel() + counts.sum()))

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        yield from super().rows(run, arm, seed, model)
        windows, about = self._windows(run, max(self.times))
        for times in self.times:
            text = windows[:, -(times * self.length + 1) :]
            ids, asked = self._planted(text, run.torch_rng(recall=self.pairs, part="test", times=times))
            parts = ids.to(run.device).split(at_once(times * self.length))
            best = torch.cat([model(rows[:, :-1])[0].argmax(-1).cpu() for rows in parts])
            right = ((best == ids[:, 1:]) & asked).sum(1) / asked.sum(1)
            yield from self.each("recalled", arm, right.tolist(), about, seed=seed, at={"times": times})

    def _planted(self, text: Tensor, generator: torch.Generator, asked: int = 1) -> tuple[Tensor, Tensor]:
        """``text [N, T + 1]`` with pairs and questions among its first bytes, and which predictions are of values."""
        count, length = text.shape
        ids, loss_mask = associative_recall(count, length - 1, self.pairs, 1 + 2 * self.keys, generator, asked)
        filler = ids == 0
        read = text[:, : int(filler[0].sum())]  # as many in every row
        return (ids + VOCAB - 1).masked_scatter(filler, read), loss_mask
