# SPDX-License-Identifier: Apache-2.0
"""Whether a published sentence encoder finds a passage in a text longer than those it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ... import catalog
from ...errors import refusal
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ._reader import embedded, long_texts, reader, whole

__all__ = ["PassageAmongFiller"]

_CALIBRATING = 6  # texts


@dataclass(frozen=True, kw_only=True)
class PassageAmongFiller(Task):
    """Texts of ``length`` tokens, each a passage at a random place of another text; a passage has to find its own.

    Embeddings are the mean of the last hidden states, of length 1. A passage by itself is the query, the cosine ranks
    the texts of all samples; ``reciprocal_rank`` is 1 over the place of its own, in [0, 1]. Passages, filler and what
    temperatures are calibrated on are of different samples of the corpus. Nothing is trained: arms are those whose
    options have ``reader``, and the strategy that their ``align`` names acts beyond ``trained`` tokens.

    Attributes:
        model: an encoder, see :func:`manyheads.models.load_reader`.
        trained: tokens of the longest text that it was trained on.
        length: tokens of a text, special ones included.
        passage: tokens of a passage.
        samples: passages, and texts.
        text: a corpus of :mod:`manyheads.data.texts` of at least ``2 * samples`` + 6 texts.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("reciprocal_rank", "1 / place of a passage's own text", higher=True),
        Metric("temperature", "temperature that a calibration found"),
    )

    model: str = "all-minilm-l6-v2"
    trained: int = 256
    length: int = 512
    passage: int = 64
    samples: int = 96
    text: str = "brown"

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: self._parts(run), lambda: self._texts(run))

    def units(self, run: RunContext) -> list[WorkUnit]:
        arms = [arm for arm in run.arms if "reader" in arm.options]
        cost = float(self.samples * self.length)
        return [WorkUnit(self.key, arm.key, cost, f"{arm.key}: embeddings", {"arm": arm.key}) for arm in arms]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, (model, _) = run.arm_of(unit), self._parts(run)
        passages, texts, others = (ids.to(run.device) for ids in self._texts(run))
        queries = embedded(model, passages)
        if align := arm.options.get("align"):
            strategy: Any = catalog.load("t5_attention_alignment")
            made = strategy.calibrated(
                model, others, [self.length], trained=self.trained, align=align, where="encoder", port=use
            )
            with use(model, made):
                found = embedded(model, texts)
            tau = float(made.temperature(0, torch.tensor([[[self.length]]])).mean())
            yield self.row("temperature", arm, tau, "calibration")
        else:
            found = embedded(model, texts)
        likeness = queries @ found.T
        place = (likeness >= likeness.diagonal()[:, None]).sum(1)
        yield from self.each("reciprocal_rank", arm, (1 / place).tolist())

    def _parts(self, run: RunContext) -> tuple[Any, Any]:
        return reader(run, self.model)

    def _texts(self, run: RunContext) -> tuple[Tensor, Tensor, Tensor]:
        """Passages ``[N, passage + 2]``, texts and those to calibrate on ``[N or 6, length]``, int64."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            tokenizer, body = self._parts(run)[1], self.length - 2
            rng = run.rng(passages=self.text)
            long = long_texts(run, tokenizer, self.text, body, 2 * self.samples + _CALIBRATING, rng)
            passages, texts = [], []
            for own, filler in zip(long[: self.samples], long[self.samples : 2 * self.samples], strict=True):
                start = int(rng.integers(0, len(own) - self.passage + 1))
                passages.append(own[start : start + self.passage])
                at = int(rng.integers(0, body - self.passage + 1))
                texts.append([*filler[:at], *passages[-1], *filler[at : body - self.passage]])
            others = [ids[:body] for ids in long[2 * self.samples :][:_CALIBRATING]]

            return whole(tokenizer, passages), whole(tokenizer, texts), whole(tokenizer, others)

        return cast(tuple[Tensor, Tensor, Tensor], run.kept(("passages", self.text, self.samples), make))
