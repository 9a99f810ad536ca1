# SPDX-License-Identifier: Apache-2.0
"""The base of tasks of translation: sentences of several languages line by line, tokens, and losses of the right words.

Tokens are pieces of bytes (BPE) of all languages together, learned on 10,000 sentences of the training part; sentences
are cut at 47 tokens. Models are trained without label smoothing, so that the loss is the likelihood.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from ...attention.masks import padded
from ...errors import UserError
from ...recipe import Batch, Part, Sample
from .._field import FieldTask, parted
from ._translator import BEGIN, END, ROOM

__all__ = ["PARTS", "Rows", "TranslationTask", "chrf", "own_lines", "vocabulary"]

Rows = list[tuple[Part, tuple[str, ...]]]
PARTS: dict[Part, Any] = {"train": "train", "validation": "val", "test": "test"}  # as Multi30k names them
_LEARNED = 10_000  # sentences of the training part from which the vocabulary is made


@dataclass(frozen=True, kw_only=True)
class TranslationTask(FieldTask):
    """Sentences in :attr:`sources` languages, ``inputs``, translated into one, ``target``.

    What is to be judged is not trained on: sentences whose translation is in another part too are left out.

    Attributes:
        label: what it is called where an experiment has it several times.
        vocabulary: tokens.
    """

    sources: ClassVar[int]

    label: str = ""
    dim: int = 128
    layers: int = 2
    heads: int = 4
    width: int = 512
    batch: int = 64
    vocabulary: int = 3000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 300 <= self.vocabulary <= 30_000:
            raise UserError("vocabulary is a number of tokens: 300 to 30000")

    @classmethod
    @abstractmethod
    def rows(cls, folder: Path | None) -> Rows:
        """Sentences by part, those of the sources and the target last."""

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        rows = cls.rows(folder)
        judged = {texts[-1] for part, texts in rows if part != "train"}
        found = [
            Sample(f"{part} {i:06d}", f"{part} {i:06d}", part, texts[:-1], texts[-1])
            for i, (part, texts) in enumerate(rows)
            if texts[-1] and any(texts[:-1]) and not (part == "train" and texts[-1] in judged)
        ]
        return sorted(found, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())

    @classmethod
    def open(cls, path: Path) -> Sample:
        """A sentence; an empty file is a source that is not there."""
        try:
            text = " ".join(path.read_text("utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text; give a file with one sentence") from error
        return Sample(path.name, "", "test", (text,))

    @classmethod
    def joined(cls, opened: Sequence[Sample]) -> Sample:
        texts = tuple(text for sample in opened for text in sample.inputs)
        if not any(texts):
            raise UserError(f"{' and '.join(sample.name for sample in opened)} are empty; give a sentence in one")
        return Sample(opened[0].name, "", "test", texts)

    @property
    def tokens(self) -> Any:
        """The tokenizer."""
        return vocabulary(type(self), self.source, self.vocabulary)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """``source_i`` and ``mask_i [B, S_i]``, ``there [B, N]``, and of targets ``words`` and ``next [B, T]``."""
        tokens = self.tokens
        batch: dict[str, Any] = {"there": torch.tensor([[bool(text) for text in sample.inputs] for sample in samples])}
        for i in range(self.sources):
            rows = [row.ids[: ROOM - 1] for row in tokens.encode_batch([sample.inputs[i] for sample in samples])]
            batch[f"source_{i}"], batch[f"mask_{i}"] = padded([torch.tensor([*row, END]) for row in rows])
        if any(sample.target is None for sample in samples):
            return batch
        rows = [row.ids[: ROOM - 1] for row in tokens.encode_batch([sample.target for sample in samples])]
        batch["words"] = padded([torch.tensor([BEGIN, *row]) for row in rows])[0]
        batch["next"] = padded([torch.tensor([*row, END]) for row in rows], -100)[0]
        return {**batch, "targets": [sample.target for sample in samples]}

    def of_right_words(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the right words, by log probabilities ``[B, T, V]``."""
        return nll_loss(log_probs.flatten(0, 1), batch["next"].flatten(), ignore_index=-100)

    def nll(self, sample: Sample, target: str | None, log_probs: Sequence[float]) -> float:
        """Mean over the words of a sample; of the words of another sentence nothing is known: that of a guess."""
        if target == sample.target:
            return -sum(log_probs) / max(len(log_probs), 1)
        return float(torch.tensor(float(self.vocabulary)).log())


def chrf(text: str, target: str) -> float:
    """chrF++ of a sentence, from 0 to 1."""
    from sacrebleu.metrics.chrf import CHRF

    score: float = CHRF(word_order=2).sentence_score(text, [target]).score
    return score / 100


@cache
def vocabulary(kind: type[TranslationTask], source: str, size: int) -> Any:
    """A tokenizer of the training part's sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    samples = kind(folder=source).samples("train")[:_LEARNED]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator((text for sample in samples for text in (*sample.inputs, sample.target)), trainer)
    return made


def own_lines(folder: Path, names: Sequence[str]) -> Rows:
    """Lines of a user's folder."""
    try:
        sides = [(folder / name).read_text("utf-8").splitlines() for name in names]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} has no {', '.join(names)} that can be read as text") from error
    if len({len(side) for side in sides}) > 1:
        raise UserError(f"{folder}: {', '.join(names)} differ in their number of lines")
    numbers = [f"{i:08d}" for i in range(len(sides[0]))]
    part = parted(numbers)
    lines = zip(*([" ".join(line.split()) for line in side] for side in sides), strict=True)
    return [(part[number], texts) for number, texts in zip(numbers, lines, strict=True)]
