# SPDX-License-Identifier: Apache-2.0
"""Records in real text that an encoder looks up by their key, from near and from far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...training import BatchFn
from ._training_task import TRAINING_METRICS, at_once
from .masked_bytes import MASK, NOT_ASKED, MaskedBytes

__all__ = ["MaskedRecall"]


@dataclass(frozen=True, kw_only=True)
class MaskedRecall(MaskedBytes):
    """A masked byte language model whose text also holds records to be looked up.

    A record is one token: one of ``keys`` with one of ``values``, all combinations are tokens of their own beside the
    bytes. Each of a sequence's records stands somewhere in a place of its own within the first quarter, and a question
    for its key (a token of its own) stands either ``near``, in the same place, or ``far``, in the last quarter, half a
    sequence away at least. What is asked for there is the record, all else is text with hidden bytes. In training it is
    near or far by chance for each record; where models are judged all are far, or all near, the control that a model
    can look up at all. A window reaches what is far only through layers, ``layers`` times as far as in one.
    ``recalled`` is the share of a sequence's records that are likeliest; the floor is what one reaches of four records
    who knows the values and not whose they are.

    Attributes:
        records: in a sequence, no two with one key.
        keys, values: that there are.
    """

    stored: ClassVar[str] = "records-"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("recalled", "records recalled", higher=True, kind="share", floor=0.25),
        Metric("masked_nll", "held-out loss on hidden bytes, nats/byte", "nats/byte"),
        *TRAINING_METRICS,
    )

    records: int = 4
    keys: int = 8
    values: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.records < 4 or self.records > self.keys:
            raise UserError("with fewer than four records a guess looks like recall, and no key stands twice")
        if self.length < 8 * self.records:
            raise UserError(f"{self.records} records and their questions need {8 * self.records} bytes of length")

    @property
    def vocab(self) -> int:
        return MASK + 1 + self.keys * (1 + self.values)

    def training_fields(self) -> Sequence[str]:
        return (*super().training_fields(), "records", "keys", "values")

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        plain = super().batches(run, seed)

        def get_batch(step: int) -> tuple[Tensor, Tensor | None]:
            generator = run.torch_rng(records=self.records, training=seed, step=step)
            ids, labels = plain(step)
            assert labels is not None
            return self.recorded(ids, labels, generator, torch.rand(len(ids), self.records, generator=generator) < 0.5)

        return get_batch

    def validation(self, run: RunContext, model: TokenModel) -> float:
        text = self._cut(run, "validation", self.length, self.validating)
        generator = run.torch_rng(records=self.records, part="tuning")
        far = torch.rand(len(text), self.records, generator=generator) < 0.5
        return self._mean(run, model, *self.recorded(*self.hidden(text, generator), generator, far))

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        yield from super().rows(run, arm, seed, model)
        text, about = self._windows(run, max(self.times))
        for times in self.times:
            for where in ("near", "far"):
                generator = run.torch_rng(records=self.records, part="test", times=times, where=where)
                read = self.hidden(text[:, : times * self.length], generator)[0]
                far = torch.full((len(read), self.records), where == "far")
                ids, labels = self.recorded(read, torch.full_like(read, NOT_ASKED), generator, far)
                best = [model(rows.to(run.device))[0].argmax(-1).cpu() for rows in ids.split(at_once(ids.shape[1]))]
                right = ((torch.cat(best) == labels) & (labels >= 0)).sum(1) / self.records
                at = {"times": times, "where": where}
                yield from self.each("recalled", arm, right.tolist(), about, seed=seed, at=at)

    def recorded(self, ids: Tensor, labels: Tensor, generator: torch.Generator, far: Tensor) -> tuple[Tensor, Tensor]:
        """``ids`` and ``labels [N, T]`` with records and questions in them, those of ``far [N, records]`` far away."""
        count, length = ids.shape
        place = length // 4 // self.records  # columns of the place of a record

        def shuffled(of: int) -> Tensor:
            return torch.rand(count, of, generator=generator).argsort(1)[:, : self.records]

        def drawn(of: int) -> Tensor:
            return torch.randint(of, far.shape, generator=generator)

        key = shuffled(self.keys)
        record = MASK + 1 + self.keys + key * self.values + drawn(self.values)
        first = shuffled(self.records) * place
        at, apart = drawn(place), 1 + drawn(place - 1)
        near = first + (at + apart) % place  # in the same place, and not where the record is
        last = length - self.records * place + shuffled(self.records) * place + drawn(place)
        question = torch.where(far, last, near)
        ids, labels = ids.scatter(1, first + at, record), labels.scatter(1, first + at, NOT_ASKED)
        return ids.scatter_(1, question, MASK + 1 + key), labels.scatter_(1, question, record)
