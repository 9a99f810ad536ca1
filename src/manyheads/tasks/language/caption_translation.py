# SPDX-License-Identifier: Apache-2.0
"""Captions of photographs in two languages, translated into a third by models trained from scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...data.translations import Language, captions
from ...experiment import Metric
from ...recipe import Batch, Sample
from ._translation import PARTS, Rows, TranslationTask, chrf, own_lines
from ._translator import BEGIN, END, ROOM, OneSource, Several, Translator

__all__ = ["CaptionTranslation", "Said"]

_LANGUAGES: tuple[Language, ...] = ("en", "fr", "cs")  # sources, and the target
_FILES = ("first.txt", "second.txt", "target.txt")


@dataclass(frozen=True)
class Said:
    """A translation.

    Attributes:
        text: as it was written, word by word the likeliest.
        target: the right one, as it was given; None where there is none.
        log_probs: of its tokens, each after the right ones before it.
    """

    text: str
    target: str | None = None
    log_probs: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class CaptionTranslation(TranslationTask):
    """Multi30k: captions in English and French, translated into Czech; 29,000 to train on, 1,014 and 1,000 others.

    The French and the Czech are translations of the English. Models write greedily, 47 tokens at most. The photographs
    are not used.

    References, all with embeddings that languages share: one source (the first), the second, both in one row read by
    one encoder, and the mean of the probabilities of two models of one source each.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "nll", "held-out loss", "nats/token",
            what="mean over the tokens of a translation, each after the right ones before it",
        ),
        Metric("chrf", "chrF++ of greedy translations", higher=True, what="mean over sentences, from 0 to 1"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("multi30k-train-cs",)
    takes: ClassVar[str] = "a folder of first.txt, second.txt and target.txt: one sentence in three languages a line"
    references: ClassVar[tuple[str, ...]] = ("one_source", "second_source", "joined_text", "averaged_models")
    together: ClassVar[int] = 2
    sources: ClassVar[int] = 2

    @classmethod
    def rows(cls, folder: Path | None) -> Rows:
        if folder is not None:
            return own_lines(folder, _FILES)
        return [(part, texts) for part, name in PARTS.items() for texts in captions(name, _LANGUAGES)]

    def translator(self, width: int, block: Callable[[], nn.Module]) -> nn.Module:
        """A model with an encoder for each source, and this attention to them: ``block()(q, states, masks) -> q``."""
        return Translator(self, width, block, range(self.sources))

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """A model with these attentions to sources, one a layer."""
        return self.translator(self.width or 2 * self.dim, iter(blocks).__next__)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        def of(which: int) -> nn.Module:
            return Translator(self, width, lambda: OneSource(self.dim, self.heads, self.dropout), (which,))

        if kind == "averaged_models":
            return Several([of(i) for i in range(self.sources)])
        if kind == "joined_text":
            one = lambda: OneSource(self.dim, self.heads, self.dropout)  # noqa: E731
            return Translator(self, width, one, range(self.sources), joined=True)
        return of(1 if kind == "second_source" else 0)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        if isinstance(model, Several):  # each learns by itself
            return torch.stack([self.loss(one, batch) for one in model.models]).mean()
        return self.of_right_words(model(batch, batch["words"]), batch)

    def predict(self, model: Any, batch: Batch) -> list[Said]:
        tokens, read = self.tokens, model.read(batch)
        words = torch.full((len(batch["there"]), 1), BEGIN, device=batch["there"].device)
        for _ in range(ROOM - 1):
            following = model.write(*read, words)[:, -1].argmax(-1)
            words = torch.cat((words, following[:, None]), 1)
            if (words == END).any(1).all():
                break
        rows = [row[1 : row.index(END) if END in row else None] for row in words.tolist()]
        texts = [tokens.decode(row).strip() for row in rows]
        if "words" not in batch:
            return [Said(text) for text in texts]
        right = batch["next"]
        logs = model.write(*read, batch["words"]).gather(-1, right.clamp(min=0)[..., None])[..., 0]
        return [
            Said(text, target, tuple(row[: int(count)].tolist()))
            for text, target, row, count in zip(texts, batch["targets"], logs.cpu(), (right >= 0).sum(1), strict=True)
        ]

    def score(self, sample: Sample, said: Said) -> Mapping[str, float]:
        return {"nll": self.nll(sample, said.target, said.log_probs), "chrf": chrf(said.text, sample.target)}

    def truth(self, sample: Sample) -> Said:
        return Said(sample.target, sample.target, (0.0,))
