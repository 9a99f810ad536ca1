# SPDX-License-Identifier: Apache-2.0
"""Captions of photographs in two languages, translated into a third by models trained from scratch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from ...attention.masks import padded
from ...data.translations import Language, captions
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Part, Sample
from .._field import FieldTask, parted
from ._translator import BEGIN, END, ROOM, OneSource, Several, Translator

__all__ = ["CaptionTranslation", "Said"]

_LANGUAGES: tuple[Language, ...] = ("en", "fr", "cs")  # sources, and the target
_FILES = ("first.txt", "second.txt", "target.txt")
_PARTS: dict[Part, Any] = {"train": "train", "validation": "val", "test": "test"}
_LEARNED = 10_000  # captions of the training part from which the vocabulary is made


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
class CaptionTranslation(FieldTask):
    """Multi30k: captions in English and French, translated into Czech; 29,000 to train on, 1,014 and 1,000 others.

    The French and the Czech are translations of the English. What is to be judged is not trained on: captions whose
    translation is in another part too are left out. Tokens are pieces of bytes (BPE) of all three languages together,
    learned on 10,000 captions of the training part; sentences are cut at 47 tokens. Models write greedily, 47 tokens at
    most, and are trained without label smoothing, so that the loss is the likelihood. The photographs are not used.

    References, all with embeddings that languages share: one source (the first), the second, both in one row read by
    one encoder, and the mean of the probabilities of two models of one source each.

    Attributes:
        label: what it is called where an experiment has it several times.
        vocabulary: tokens.
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
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        if folder is None:
            rows = [(part, texts) for part, name in _PARTS.items() for texts in captions(name, _LANGUAGES)]
        else:
            rows = _own(folder)
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

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """``source_i`` and ``mask_i [B, S_i]``, ``there [B, N]``, and of targets ``words`` and ``next [B, T]``."""
        tokens = vocabulary(type(self), self.source, self.vocabulary)
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
        return nll_loss(model(batch, batch["words"]).flatten(0, 1), batch["next"].flatten(), ignore_index=-100)

    def predict(self, model: Any, batch: Batch) -> list[Said]:
        tokens, read = vocabulary(type(self), self.source, self.vocabulary), model.read(batch)
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
        from sacrebleu.metrics.chrf import CHRF

        if said.target == sample.target:
            nll = -sum(said.log_probs) / max(len(said.log_probs), 1)
        else:  # what was said of the words of another sentence tells nothing of these
            nll = float(torch.tensor(float(self.vocabulary)).log())
        return {"nll": nll, "chrf": CHRF(word_order=2).sentence_score(said.text, [sample.target]).score / 100}

    def truth(self, sample: Sample) -> Said:
        return Said(sample.target, sample.target, (0.0,))


@cache
def vocabulary(kind: type[CaptionTranslation], source: str, size: int) -> Any:
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


def _own(folder: Path) -> list[tuple[Part, tuple[str, ...]]]:
    """Lines of a user's folder."""
    try:
        sides = [(folder / name).read_text("utf-8").splitlines() for name in _FILES]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} has no {', '.join(_FILES)} that can be read as text") from error
    if len({len(side) for side in sides}) > 1:
        raise UserError(f"{folder}: {', '.join(_FILES)} differ in their number of lines")
    names = [f"{i:08d}" for i in range(len(sides[0]))]
    part = parted(names)
    lines = zip(*([" ".join(line.split()) for line in side] for side in sides), strict=True)
    return [(part[name], texts) for name, texts in zip(names, lines, strict=True)]
