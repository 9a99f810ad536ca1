# SPDX-License-Identifier: Apache-2.0
"""Sentences that are translated while they are read, by models trained from scratch: quality, and how far they lag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.latency import average_lagging, average_proportion, differentiable_average_lagging
from ...data.translations import captions, made_up
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from ._streaming import Reading, prefix, stream, word_numbers
from ._translation import PARTS, Rows, TranslationTask, chrf, own_lines
from ._translator import END, OneSource, Translator

__all__ = ["Simultaneous", "SimultaneousTranslation"]

_FILES = ("source.txt", "target.txt")
_PUBLIC: dict[str, Any] = {"german": "de", "french": "fr", "czech": "cs"}
_MADE: dict[Any, tuple[int, int]] = {"train": (0, 20_000), "validation": (1, 1000), "test": (2, 1000)}  # seed, pairs


@dataclass(frozen=True)
class Simultaneous:
    """A translation that was written while its source was read.

    Attributes:
        words: that were written.
        read: how many words of the source had been read when each was written, one that had begun among them.
        source: words of it.
        target: the right translation, as it was given; None where there is none.
        log_probs: of the right pieces, each after the right ones before it and what had been read by then.
        misplaced: share of the mass of alignments that training has in wrong places, where any are estimated.
    """

    words: tuple[str, ...]
    read: tuple[int, ...]
    source: tuple[str, ...]
    target: str | None = None
    log_probs: tuple[float, ...] = ()
    misplaced: float = 0.0

    def __str__(self) -> str:
        """Words as they were written, and in brackets what was read before each."""
        parts, done = [], 0
        for word, read in zip(self.words, self.read, strict=True):
            parts += [f"[{' '.join(self.source[done:read])}]"] if read > done else []
            parts.append(word)
            done = max(done, read)
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SimultaneousTranslation(TranslationTask):
    """Multi30k: captions in English, translated while they are read; 29,000 to train on, 1,014 and 1,000 others.

    Models have an encoder that reads from first to last. They read and write pieces of words, greedily, 47 at most; an
    end is written once all has been read. Latency is in words of the source, by what had been read, begun words
    included, when the last piece of each word was written. The references read all first: ``wait_k`` and ``emma`` say
    otherwise.

    ``language=made`` is made here: sentences of 5 to 11 words of 60, each of which has one word in the target language;
    half of them change places with the word after them, and some are idioms of three words. There one can know when to
    write: a policy has to wait for one word after half of the words, and for none after the others.

    Attributes:
        language: that is translated into: ``german``, ``french``, ``czech``, or ``made``, with a source made up too.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "nll", "held-out loss", "nats/token",
            what="mean over the tokens of a translation, each after the right ones before it and what was read by then",
        ),
        Metric("al", "average lagging", "words", what="AL by the length of the output"),
        Metric("laal", "length-adaptive average lagging", "words"),
        Metric("dal", "differentiable average lagging", "words"),
        Metric("ap", "average proportion", what="mean share of the source that had been read"),
        Metric(
            "misplaced", "misplaced alignment",
            what="mass of alignments that training has in wrong places, beside the recursion in float64",
        ),
        Metric("chrf", "chrF++ of greedy translations", higher=True, what="mean over sentences, from 0 to 1"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("multi30k-train-de",)
    takes: ClassVar[str] = "a folder of source.txt and target.txt: one sentence in two languages a line"
    references: ClassVar[tuple[str, ...]] = ("whole_sentence",)
    sources: ClassVar[int] = 1

    language: str = "german"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language not in (*_PUBLIC, "made"):
            raise UserError(f"language {self.language!r}: give {', '.join(_PUBLIC)} or made")

    @property
    def source(self) -> str:
        return self.folder or self.language

    @classmethod
    def rows(cls, folder: Path | None) -> Rows:
        name = str(folder or "german")
        if name == "made":
            return [
                (part, pair)
                for part, (seed, count) in _MADE.items() for pair in made_up(count, np.random.default_rng(seed))
            ]  # fmt: skip
        if name not in _PUBLIC:
            return own_lines(Path(name), _FILES)
        return [(part, texts) for part, of in PARTS.items() for texts in captions(of, ("en", _PUBLIC[name]))]

    def translator(self, width: int, block: Callable[[], nn.Module]) -> nn.Module:
        """A model with this attention to the source: ``block()(q, states, masks) -> q``, of one state and mask."""
        return Translator(self, width, block, (0,), causal=True)

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """A model with these attentions to the source, one a layer."""
        return self.translator(self.width or 2 * self.dim, iter(blocks).__next__)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return self.translator(width, lambda: OneSource(self.dim, self.heads, self.dropout))

    def loss(self, model: Any, batch: Batch, read: Tensor | None = None) -> Tensor:
        """Mean loss of a batch; ``read [B or 1, T or 1]``, pieces of the source before each word, None for all.

        A model whose attention has a policy of its own is asked with that where ``read`` is None.
        """
        states, (mask,) = model.read(batch)
        mask = mask if read is None else prefix(mask, read)
        return self.of_right_words(model.write(states, [mask], batch["words"]), batch)

    def predict(self, model: Any, batch: Batch) -> list[Simultaneous]:
        return self.streamed(model, batch, lambda seen, length: length)

    def streamed(self, model: Any, batch: Batch, reading: Reading) -> list[Simultaneous]:
        """Translations with a policy, see :func:`stream`."""
        free, tokens = stream(model, batch, reading), self.tokens
        sources = [self._words(row) for row in batch["source_0"].tolist()]
        found = []
        for (words, begun), row, seen in zip(sources, free.words.tolist(), free.seen.tolist(), strict=True):
            pieces = [(p, n) for p, n in zip(row[: row.index(END)] if END in row else row, seen, strict=False)
                      if p > END and tokens.id_to_token(p)]  # fmt: skip
            numbers = word_numbers([tokens.id_to_token(piece) for piece, _ in pieces])
            written, read = [], []
            for word in range(1, 1 + max(numbers, default=0)):
                own = [pieces[i] for i, number in enumerate(numbers) if number == word]
                written.append(tokens.decode([piece for piece, _ in own]).strip())
                read.append(begun[min(own[-1][1], len(begun)) - 1])  # when its last piece was written
            found.append((tuple(written), tuple(read), words))
        if "words" not in batch:
            return [Simultaneous(*one) for one in found]
        right = batch["next"]
        logs = stream(model, batch, reading, right).log_probs.cpu()
        return [
            Simultaneous(*one, target, tuple(row[: int(count)].tolist()))
            for one, target, row, count in zip(found, batch["targets"], logs, (right >= 0).sum(1), strict=True)
        ]

    def _words(self, row: Sequence[int]) -> tuple[tuple[str, ...], list[int]]:
        """Words of a source, and how many of them have begun by each of its pieces."""
        pieces = list(row[: row.index(END)])
        return (
            tuple(self.tokens.decode(pieces).split()),
            word_numbers([self.tokens.id_to_token(piece) for piece in pieces]) or [0],
        )

    def score(self, sample: Sample, said: Simultaneous) -> Mapping[str, float]:
        source, own = max(1, len(said.source)), said.target == sample.target
        delays, wrong = said.read or (source,), said.misplaced
        if not own or not said.read:  # of another sentence, or of none, nothing was said before all had been read
            delays, wrong = (source,), 0.0 if own else 1.0
        g, x, y, z = (
            torch.tensor(value, dtype=torch.float64)
            for value in (delays, source, len(delays), max(1, len(sample.target.split())))
        )
        return {
            "nll": self.nll(sample, said.target, said.log_probs),
            "al": float(average_lagging(g, x, y)), "laal": float(average_lagging(g, x, y, z)),
            "dal": float(differentiable_average_lagging(g, x, y)), "ap": float(average_proportion(g, x, y)),
            "misplaced": wrong, "chrf": chrf(" ".join(said.words), sample.target),
        }  # fmt: skip

    def truth(self, sample: Sample) -> Simultaneous:
        words = tuple(sample.target.split())
        return Simultaneous(words, (0,) * len(words), tuple(sample.inputs[0].split()), sample.target, (0.0,))

    def pictures(self, samples: Sequence[Sample], said: Sequence[Simultaneous]) -> Sequence[Picture]:
        """What had been read when each word of the first translation was written."""
        one = said[0]
        if not one.words:
            return ()
        values = [[float(i < read) for i in range(len(one.source))] for read in one.read]
        rows, columns = ([f"{i + 1} {word}" for i, word in enumerate(words)] for words in (one.words, one.source))
        return (Picture("read before each word is written", rows, columns, values, ("written", "read")),)
