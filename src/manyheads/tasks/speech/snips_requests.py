# SPDX-License-Identifier: Apache-2.0
"""Requests to an assistant in writing: their intent and the slots that their words fill, from few labelled ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from ...attention.masks import padded
from ...data.sentences import requests
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Part, Picture, Sample
from ._understanding import StandingEncoder, UnderstandingTask, confusion, take

__all__ = ["Frame", "JointModel", "SnipsRequests", "labels", "spans"]

Span = tuple[str, int, int]  # name of a slot, its first word, and that behind its last
_LONGEST = 128  # tokens of a request
_FILES = ("seq.in", "label", "seq.out")
_FOLDERS: dict[str, Part] = {"train": "train", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class Frame:
    """What is meant.

    Attributes:
        intent: of the request.
        slots: that its words fill.
        words: of the request, to show; no part of what is compared.
        log_probs: of intents ``[intents]`` and of each word's tags ``[W, tags]``; no part of what is compared.
    """

    intent: str
    slots: tuple[Span, ...]
    words: tuple[str, ...] = field(default=(), compare=False)
    log_probs: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return " ".join([self.intent, *(f"{name}={'_'.join(self.words[a:b])}" for name, a, b in self.slots)])


def spans(tags: Sequence[str]) -> tuple[Span, ...]:
    """Slots of tags of words; a slot that begins with ``I-`` begins all the same."""
    found: list[Span] = []
    for i, tag in enumerate(tags):
        mark, _, name = tag.partition("-")
        if mark == "I" and found and found[-1][0] == name and found[-1][2] == i:
            found[-1] = (name, found[-1][1], i + 1)
        elif mark in ("B", "I"):
            found.append((name, i, i + 1))
    return tuple(found)


class WordStates(StandingEncoder):
    """BERT: tokens ``[B, T]`` -> states ``[B, T, dim]``."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float, vocabulary: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        kind: Any = BertConfig
        config = kind(
            vocab_size=vocabulary, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * dim, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        self.inside = BertModel(config, add_pooling_layer=False)

    def states(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """States and the same mask."""
        return self.inside(input_ids=inputs, attention_mask=mask.long()).last_hidden_state, mask


class JointModel(nn.Module):
    """Intent and slots by attention: words' states are summed by weights, and each is tagged beside that sum.

    Args:
        encoder: of tokens.
        dim, width: of states, and of the hidden layer before each answer.
        intents, tags: how many.
        dropout: of states.
    """

    def __init__(self, encoder: StandingEncoder, dim: int, width: int, intents: int, tags: int, dropout: float) -> None:
        super().__init__()
        self.encoder, self.dropout, self.pool = encoder, nn.Dropout(dropout), nn.Linear(dim, 1)
        self.intent = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, intents))
        self.tag = nn.Sequential(nn.Linear(2 * dim, width), nn.GELU(), nn.Linear(width, tags))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of intents ``[B, intents]`` and of the tags of words ``[B, W, tags]``."""
        states = self.dropout(self.encoder(batch["inputs"], batch["mask"])[0])
        words = states.gather(1, batch["first"][..., None].expand(-1, -1, states.shape[-1]))
        weights = self.pool(words).masked_fill(~batch["there"][..., None], float("-inf")).softmax(1)
        whole = (weights * words).sum(1)
        both = torch.cat((words, whole[:, None].expand_as(words)), -1)
        return self.intent(whole), self.tag(both)


@dataclass(frozen=True, kw_only=True)
class SnipsRequests(UnderstandingTask):
    """SNIPS: 13,084 requests of seven intents, with 39 slots, 700 that validate and 700 that test.

    A share of the training part is trained on. The encoder has the shape of MiniLM and its tokens; a word is read at
    its first. Requests of the training part that are in another part word for word are left out (38).

    Attributes:
        share: of the training part; the same requests for all arms and trainings.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "slot_f1", "F1 of the slots of a request", higher=True, kind="share",
            what="name, first and last word right; mean over requests, and 1 where none are and none were found",
        ),
        Metric("intent", "requests whose intent is right", higher=True, kind="share"),
        Metric("frame", "requests of which intent and all slots are right", higher=True, kind="share"),
        Metric("nll", "held-out loss, of the intent and the mean over words, nats", "nats/request"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("snips", "snips-jointbert")
    published: ClassVar[tuple[str, ...]] = ("all-minilm-l6-v2",)
    takes: ClassVar[str] = "a folder of train, dev and test, each with seq.in, seq.out (tags B-, I- and O) and label"
    references: ClassVar[tuple[str, ...]] = ("joint_encoder",)
    encoder: ClassVar[str] = "all-minilm-l6-v2"

    dim: int = 384
    layers: int = 6
    heads: int = 12
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise UserError("share is of the training part: above 0, at most 1")

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        if folder is None:
            rows = [(one.part, one.text, one.intent, one.tags) for one in requests()]
        else:
            rows = [row for name, part in _FOLDERS.items() for row in _own(folder / name, part)]
        home = {text: part for part, text, _, _ in rows}  # the last: training, validation, test
        found = dict[str, Sample]()
        for part, text, intent, tags in rows:
            if home[text] == part:
                words = tuple(text.split())
                found[f"{part} {text}"] = Sample(f"{part} {text}", text, part, words, Frame(intent, spans(tags), words))
        return [found[name] for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())]

    @classmethod
    def open(cls, path: Path) -> Sample:
        try:
            words = path.read_text("utf-8").lower().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text; give a file with one request") from error
        if not words:
            raise UserError(f"{path} is empty; give a file with one request")
        return Sample(path.name, "", "test", tuple(words))

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        return super().draw(rng, samples[: max(1, round(self.share * len(samples)))])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        read = _tokenizer(self.encoder)(
            [list(sample.inputs) for sample in samples], is_split_into_words=True, padding=True, truncation=True,
            max_length=_LONGEST, return_tensors="pt",
        )  # fmt: skip
        firsts = []
        for i, sample in enumerate(samples):
            at: dict[Any, int] = {}
            for place, word in enumerate(read.word_ids(i)):
                at.setdefault(word, place)
            firsts.append(torch.tensor([at.get(k, 0) for k in range(len(sample.inputs))]))
        first, there = padded(firsts)
        batch = {
            "inputs": read["input_ids"], "mask": read["attention_mask"].bool(), "first": first, "there": there,
            "words": [sample.inputs for sample in samples],
        }  # fmt: skip
        if any(sample.target is None for sample in samples):
            return batch
        numbers = [_numbers(self.samples("train"), sample.target, len(sample.inputs)) for sample in samples]
        meant = torch.tensor([intent for intent, _ in numbers])
        return {**batch, "intents": meant, "tags": padded([t for _, t in numbers], -100)[0]}

    def reference(self, width: int, kind: str = "") -> nn.Module:
        intents, tags = labels(self.samples("train"))
        encoder = WordStates(self.dim, self.layers, self.heads, self.dropout, len(_tokenizer(self.encoder)))
        return JointModel(encoder, self.dim, width, len(intents), len(tags), self.dropout)

    def load_published(self, model: Any) -> None:
        from ...models import load_reader

        found: Any = load_reader(self.encoder, "cpu", torch.float32)[0]
        has = {"dim": found.config.hidden_size, "heads": found.config.num_attention_heads}
        take(model.encoder.inside, found, self.encoder, self.shape(), {**has, "layers": len(found.encoder.layer)})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        intents, tags = model(batch)
        return cross_entropy(intents.float(), batch["intents"]) + cross_entropy(tags.float().mT, batch["tags"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Frame]:
        intents, tags = labels(self.samples("train"))
        first, second = (logits.float().log_softmax(-1).cpu() for logits in model(batch))
        found = []
        for k, each, words in zip(first, second, batch["words"], strict=True):
            each = each[: len(words)]
            slots = spans([tags[j] for j in each.argmax(-1).tolist()])
            found.append(Frame(intents[int(k.argmax())], slots, words, (k, each)))
        return found

    def score(self, sample: Sample, said: Frame) -> Mapping[str, float]:
        right, found = set(sample.target.slots), set(said.slots)
        whole = len(right) + len(found)
        intent = float(sample.target.intent == said.intent)
        f1 = 2 * len(right & found) / whole if whole else 1.0
        of_intents, of_tags = said.log_probs or _sure(self.samples("train"), said, len(sample.inputs))
        meant, tags = _numbers(self.samples("train"), sample.target, len(sample.inputs))
        nll = nll_loss(of_intents[None], torch.tensor([meant])) + nll_loss(of_tags, tags)
        return {"slot_f1": f1, "intent": intent, "frame": intent * float(right == found), "nll": float(nll)}

    def truth(self, sample: Sample) -> Frame:
        made: Frame = sample.target
        return made

    def pictures(self, samples: Sequence[Sample], said: Sequence[Frame]) -> Sequence[Picture]:
        names = labels(self.samples("train"))[0]
        pairs = [(s.target.intent, one.intent) for s, one in zip(samples, said, strict=True)]
        return [confusion("intents", names, [(names.index(a), names.index(b)) for a, b in pairs if a in names])]


@cache
def _tokenizer(name: str) -> Any:
    from ...models import tokenizer

    return tokenizer(name)


@lru_cache(maxsize=4)
def labels(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Intents and tags of training requests, sorted."""
    intents = sorted({sample.target.intent for sample in samples})
    names = sorted({name for sample in samples for name, _, _ in sample.target.slots})
    return intents, ["O", *(f"{mark}-{name}" for name in names for mark in "BI")]


@lru_cache(maxsize=4)
def _numbered(samples: Sequence[Sample]) -> tuple[dict[str, int], dict[str, int]]:
    intents, tags = ({name: i for i, name in enumerate(names)} for names in labels(samples))
    return intents, tags


def _numbers(known: Sequence[Sample], frame: Frame, words: int) -> tuple[int, Tensor]:
    """An intent and the tags of words ``[W]`` as numbers; -100 for those that no training request has."""
    intents, tags = _numbered(known)
    found = torch.full((words,), tags["O"])
    for name, begin, end in frame.slots:
        for i in range(begin, min(end, words)):
            found[i] = tags.get(f"{'B' if i == begin else 'I'}-{name}", -100)
    return intents.get(frame.intent, -100), found


def _sure(known: Sequence[Sample], frame: Frame, words: int) -> tuple[Tensor, Tensor]:
    """Log probabilities that leave no doubt."""
    meant, found = _numbers(known, frame, words)
    intents, tags = (len(names) for names in labels(known))
    one_hot = torch.eye(max(intents, tags)).clamp(min=1e-4).log()
    return one_hot[meant, :intents].log_softmax(-1), one_hot[found, :tags].log_softmax(-1)


def _own(folder: Path, part: Part) -> list[tuple[Part, str, str, tuple[str, ...]]]:
    """Requests of a user's folder."""
    try:
        texts, intents, tags = ((folder / name).read_text("utf-8").splitlines() for name in _FILES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} has no {', '.join(_FILES)} that can be read; give {SnipsRequests.takes}") from error
    if len({len(texts), len(intents), len(tags)}) > 1:
        raise UserError(f"{folder}: {', '.join(_FILES)} differ in their number of lines")
    rows = [
        (part, " ".join(text.split()), intent.strip(), tuple(said.split()))
        for text, intent, said in zip(texts, intents, tags, strict=True)
    ]
    for i, (_, text, intent, said) in enumerate(rows, 1):
        if not intent or not text or len(text.split()) != len(said):
            raise UserError(f"{folder}, line {i}: a request, an intent and as many tags as words are needed")
    return rows
