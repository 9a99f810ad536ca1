# SPDX-License-Identifier: Apache-2.0
"""Loss of a byte language model of each arm on files that none has seen, within the trained length and beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...data.texts import Text
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...models.decoder import TokenModel
from ...training import BatchFn, token_nll
from ..text._corpus import Corpus
from ._bytes import VOCAB, Bytes, flat, split
from ._training_task import TRAINING_METRICS, TrainingTask, at_once

__all__ = ["ByteLM", "spans"]

_CALIBRATING = 4  # sequences


def spans(length: int, reach: int) -> list[tuple[int, int]]:
    """Parts of a window of ``reach * length`` bytes, each four times as far as the last, then by doubling."""
    ends = [length]
    while ends[0] > 32:
        ends.insert(0, ends[0] // 4)
    while ends[-1] < reach * length:
        ends.append(2 * ends[-1])
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True, kw_only=True)
class ByteLM(TrainingTask):
    """Train a byte language model of every arm on text, and judge it on windows of other files.

    ``token_nll`` is the loss on the last bytes of a window that is read from ``times * length`` bytes before its end:
    the same bytes however much stands before them. ``span_nll`` is the loss by position in windows of ``reach *
    length`` bytes (less where no held-out file is as long), named by the last byte of a span.

    Attributes:
        judged: last bytes of a window that are judged; 0 for ``length``, all of them at one times the length.
        reach: multiples of ``length`` that windows judged by position are long; 0 for none.
        validating: windows of ``length`` that a learning rate is judged on.
        text: what to read when the user gives nothing, a corpus of :mod:`manyheads.data.texts`.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("token_nll", "held-out loss, nats/byte", "nats/byte"),
        Metric("span_nll", "held-out loss by position, nats/byte", "nats/byte"),
        *TRAINING_METRICS,
    )

    judged: int = 0
    reach: int = 0
    validating: int = 64
    text: str = "code"

    @property
    def vocab(self) -> int:
        return VOCAB

    def training_fields(self) -> Sequence[str]:
        return ("text", "validating")

    def units(self, run: RunContext) -> list[WorkUnit]:
        self._numbers(run, "train", 4 * self.length)  # too short a text is found now
        self._windows(run, max(self.times))
        self._cut(run, "validation", self.length + 1, self.validating)
        return super().units(run)

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        data = self._numbers(run, "train", 4 * self.length)

        def get_batch(step: int) -> tuple[Tensor, None]:
            places = run.rng(training=seed, step=step).integers(0, len(data) - self.length, self.batch)
            return data[torch.from_numpy(places)[:, None] + torch.arange(self.length + 1)].long(), None

        return get_batch

    def validation(self, run: RunContext, model: TokenModel) -> float:
        ids = self._cut(run, "validation", self.length + 1, self.validating).to(run.device)
        return float(token_nll(model, ids, at_once(self.length)).mean())

    def calibrating(self, run: RunContext) -> Tensor:
        return self._cut(run, "validation", max(self.times) * self.length, _CALIBRATING).to(run.device)

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        for times in self.times:
            length = times * self.length
            ids, about = self._windows(run, max(self.times))
            found = token_nll(model, ids[:, -(length + 1) :].to(run.device), at_once(length))
            losses = found[:, -(self.judged or self.length) :].mean(1).tolist()
            yield from self.each("token_nll", arm, losses, about, seed=seed, at={"times": times})
        reach = self.reached(run)
        if not reach:
            return
        ids, about = self._windows(run, reach)
        found = token_nll(model, ids.to(run.device), at_once(reach * self.length))
        for first, last in spans(self.length, reach):
            more = [{"first": first, **window} for window in about]
            losses = found[:, first:last].mean(1).tolist()
            yield from self.each("span_nll", arm, losses, more, seed=seed, at={"last": last})

    def reached(self, run: RunContext) -> int:
        """The largest multiple of the length, halving from ``reach``, that held-out windows can have."""
        reach = self.reach
        while reach > 1:
            try:
                self._windows(run, reach)
            except UserError:
                reach //= 2
            else:
                break
        return reach

    def _parts(self, run: RunContext) -> dict[str, list[Text]]:
        def make() -> dict[str, list[Text]]:
            from ...data.texts import corpus

            return split(run.data.get("texts") or corpus(self.text))

        return cast(dict[str, list[Text]], run.kept(("parts", self.text), make))

    def _numbers(self, run: RunContext, part: str, least: int) -> Tensor:
        def make() -> Tensor:
            return flat(self._parts(run)[part], least, part.replace("train", "training"))

        return cast(Tensor, run.kept(("bytes", self.text, part, least), make))

    def _held_out(self, run: RunContext) -> Corpus:
        """Files that no model is trained on, whose bytes are kept once they are drawn from."""
        return cast(Corpus, run.kept(("held out", self.text), lambda: Corpus(self._parts(run)["test"], Bytes())))

    def _windows(self, run: RunContext, times: int) -> tuple[Tensor, list[dict[str, object]]]:
        """Held-out windows ``[samples, times * length + 1]``, and where they are from."""

        def make() -> tuple[Tensor, list[dict[str, object]]]:
            size = times * self.length + 1
            rng = run.rng(windows=self.text, size=size)
            found = self._held_out(run).windows(size, self.samples, rng)
            about: list[dict[str, object]] = [{"text": window.text, "overlaps": window.overlaps} for window in found]
            return torch.from_numpy(np.stack([window.ids for window in found])), about

        key = ("windows", self.text, self.samples, times * self.length)
        return cast(tuple[Tensor, list[dict[str, object]]], run.kept(key, make))

    def _cut(self, run: RunContext, part: str, size: int, count: int) -> Tensor:
        """Up to ``count`` windows of ``size`` bytes, spread evenly over a part: int64 ``[N, size]``."""
        data = self._numbers(run, part, size)
        starts = torch.linspace(0, len(data) - size, min(count, len(data) // size), dtype=torch.float64).long()
        return data[starts[:, None] + torch.arange(size)].long()
