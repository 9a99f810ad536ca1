# SPDX-License-Identifier: Apache-2.0
"""Response selection: which of several replies is the one that a dialogue went on with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.masks import padded
from ...data.ranking import words
from ...data.support_dialogues import dialogues
from ...errors import UserError, refusal
from ...experiment import Metric, RunContext
from ...recipe import Batch, Part, Recipe, Sample
from .._embedded import embedded_texts
from .._field import MODEL_METRICS, FieldTask, parted
from ..training._rankings import BM25
from ._selection import (
    CrossEncoder,
    DualEncoder,
    Pool,
    Pooled,
    TextEncoder,
    context_tokens,
    published,
    reply_tokens,
    tokens,
)  # fmt: skip

__all__ = ["Ranked", "ResponseSelection"]

_JUDGED_AT_ONCE = 128  # contexts: a reply that several of them have among theirs is read once
_UNLIKELY = 1e-4  # probability of a reply that was not among those that were scored
_POOL = 5  # replies that others are drawn from, at least, by those that are drawn


@dataclass(frozen=True)
class Ranked:
    """Replies and how well each fits.

    Attributes:
        replies: texts.
        scores: float32 ``[C]``.
    """

    replies: tuple[str, ...]
    scores: Tensor = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.replies[int(self.scores.argmax())] if self.replies else ""

    def place(self, reply: str) -> int:
        """From 1; of replies that score the same it is the last, and behind all where it is not among them."""
        if reply not in self.replies:
            return len(self.replies) + 1
        return int((self.scores >= self.scores[self.replies.index(reply)]).sum())

    def nll(self, reply: str) -> float:
        """Of a softmax over the scores, in nats."""
        if reply not in self.replies:
            return -float(np.log(_UNLIKELY))
        return -float(self.scores.log_softmax(0)[self.replies.index(reply)])


@dataclass(frozen=True, kw_only=True)
class ResponseSelection(FieldTask):
    """Real dialogues of ESConv: each reply of a supporter among replies of other dialogues.

    Training is by in-batch negatives: the candidates of a context are its own reply and those of the other samples that
    were drawn with it. A cross-encoder has ``negatives`` of them, for it reads every pair. In the validation and the
    test part a context has ``candidates`` replies, its own and others drawn once from other dialogues of that part,
    without those of the same words. The rate is chosen by the held-out loss, which needs fewer samples than recall.

    Reference models are bi-encoders of mean outputs (``bi_encoder``) or first outputs (``first_token``), and a
    ``cross_encoder``.

    Attributes:
        candidates: replies that a context is judged with.
        context_tokens, reply_tokens: that are read, the last of a context and the first of a reply.
        negatives: replies beside the right one in a cross-encoder's training.
        start: weights of the encoder: ``published`` (MiniLM's, of its lowest layers where ``layers`` says fewer),
            ``random``, or ``auto``, published where ``dim`` and ``heads`` are its own.
        tied: one encoder for contexts and replies; the paper has two that start alike.
        still: lowest layers that learn nothing, nor do the embeddings then; 0 lets all learn.
        label: what it is called where an experiment has it several times.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("nll", "held-out loss among the candidates, nats", "nats/reply"),
        Metric("recall", "R@1/C: contexts whose own reply is first of C", higher=True, kind="share", floor=0.05,
               what="of replies that score the same, the right one counts as the last"),
        Metric("mrr", "reciprocal rank of the right reply", higher=True, kind="share"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("esconv-test",)
    published: ClassVar[tuple[str, ...]] = ("all-minilm-l6-v2",)
    takes: ClassVar[str] = "a folder of dialogues NAME.txt, a message a line; three dialogues or more"
    references: ClassVar[tuple[str, ...]] = ("bi_encoder", "first_token", "cross_encoder")
    encoder: ClassVar[str] = "all-minilm-l6-v2"

    dim: int = 384
    layers: int = 6
    heads: int = 12
    rates: tuple[float, ...] = (5e-5, 2e-4)
    samples_judged: int = 400
    candidates: int = 20
    context_tokens: int = 128
    reply_tokens: int = 40
    negatives: int = 15
    start: Literal["auto", "published", "random"] = "auto"
    tied: bool = True
    still: int = 0
    label: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2 or self.negatives < 1 or self.batch < 2:
            raise UserError("candidates and batch are 2 or more, negatives 1 or more: a reply is told from others")
        if min(self.context_tokens, self.reply_tokens) < 3 or self.context_tokens + self.reply_tokens > 512:
            raise UserError("context_tokens and reply_tokens are 3 or more, and 512 together at most")
        if not 0 <= self.still <= self.layers:
            raise UserError("still is a number of layers, at most all of them")

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.floored(recall=1 / self.candidates), *MODEL_METRICS)

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        found = []
        for part, name, messages, answers in _own(folder) if folder else _public():
            for i in answers:
                about = {"context": name}
                found.append(Sample(f"{name} {i}", name, part, tuple(messages[:i]), messages[i], about))
        return sorted(found, key=lambda one: hashlib.sha256(one.name.encode()).digest())

    @classmethod
    def open(cls, path: Path) -> Sample:
        lines = _lines(path)
        cut = lines.index("") if "" in lines else len(lines)
        messages, offered = (tuple(filter(None, some)) for some in (lines[:cut], lines[cut:]))
        if not messages or not offered:
            raise UserError(f"{path}: give the messages so far, one a line, an empty line, and replies to choose from")
        return Sample(path.name, "", "test", messages, None, {"others": tuple(dict.fromkeys(offered))})

    def judged(self, part: Part) -> Sequence[Sample]:
        """Samples with their ``others``, the same ones for every arm and training."""
        every, chosen = self.samples(part), super().judged(part)
        pool = every[: max(len(chosen), _POOL * self.candidates)]
        return [dataclasses.replace(one, about={**one.about, "others": self._others(one, pool)}) for one in chosen]

    def _others(self, sample: Sample, pool: Sequence[Sample]) -> tuple[str, ...]:
        seed = int.from_bytes(hashlib.sha256(sample.name.encode()).digest()[:8], "big")
        found: dict[str, str] = {}
        for i in np.random.default_rng(seed).permutation(len(pool)):
            other = pool[int(i)]
            if other.group != sample.group and (same := _same(other.target)) != _same(sample.target):
                found.setdefault(same, other.target)
            if len(found) == self.candidates - 1:
                break
        return tuple(found.values())

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples whose replies differ.

        Raises:
            UserError: there are not so many.
        """
        found: dict[str, Sample] = {}
        for i in rng.permutation(len(samples)):
            found.setdefault(_same(samples[int(i)].target), samples[int(i)])
            if len(found) == self.batch:
                return list(found.values())
        raise UserError(f"there are {len(found)} different replies to train on: give the task batch={len(found)}")

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of contexts, each reply once, and which of them each context has.

        ``inputs``, ``mask [B, N]``; ``replies``, ``reply_mask [R, M]``; ``candidates [B, C]`` by number among those,
        ``offered [B, C]``, and ``right [B]``, the column of the right one. Samples without ``others`` have each
        other's replies.
        """
        within = [one.target for one in samples]
        texts: list[tuple[str, ...]] = []
        for one in samples:
            others = one.about.get("others", within)
            texts.append(tuple(dict.fromkeys(others if one.target is None else (*others, one.target))))
        numbers = {text: i for i, text in enumerate(dict.fromkeys(text for some in texts for text in some))}
        inputs, mask = padded([context_tokens(self.encoder, s.inputs, self.context_tokens) for s in samples])
        replies, reply_mask = padded([reply_tokens(self.encoder, text, self.reply_tokens) for text in numbers])
        candidates, offered = padded([torch.tensor([numbers[text] for text in some]) for some in texts])
        shown = tokens(self.encoder).convert_ids_to_tokens(inputs[0][mask[0]].tolist())
        batch = {
            "inputs": inputs, "mask": mask, "replies": replies, "reply_mask": reply_mask, "candidates": candidates,
            "offered": offered, "texts": texts, "words": shown,
        }  # fmt: skip
        if any(one.target is None for one in samples):
            return batch
        return {**batch, "right": torch.tensor([t.index(s.target) for t, s in zip(texts, samples, strict=True)])}

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """Refused: a published encoder has its own blocks.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.name} has the encoder of {self.encoder}: no other blocks go into it")

    def text_encoder(self, width: int) -> TextEncoder:
        """An encoder with the weights that it starts from."""
        made = TextEncoder(
            self.dim, self.layers, self.heads, self.dropout, width, len(tokens(self.encoder)), self.still
        )  # fmt: skip
        own = self.start == "published" or (self.start == "auto" and (self.dim, self.heads) == (384, 12))
        if own and made.up.weight.device.type != "meta":
            made.load_published(self.encoder, {"dim": self.dim, "heads": self.heads, "layers": self.layers})
        return made

    def reference(self, width: int, kind: str = "") -> nn.Module:
        if kind == "cross_encoder":
            return CrossEncoder(self.text_encoder(width), self.dim)
        pool: Pool = "first" if kind == "first_token" else "mean"
        second = None if self.tied else self.text_encoder(width)
        return DualEncoder(self.text_encoder(width), Pooled(pool), pool, second)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if isinstance(model, CrossEncoder):
            batch = fewer(batch, self.negatives)
        return cross_entropy(_masked(model(batch), batch), batch["right"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Ranked]:
        scores = _masked(model(batch), batch).cpu()
        return [Ranked(some, row[: len(some)]) for some, row in zip(batch["texts"], scores, strict=True)]

    def said(self, recipe: Recipe, model: nn.Module, samples: Sequence[Sample], device: torch.device) -> list[Any]:
        wide = dataclasses.replace(self, batch=max(self.batch, _JUDGED_AT_ONCE))
        return super(ResponseSelection, wide).said(recipe, model, samples, device)

    def score(self, sample: Sample, said: Ranked) -> Mapping[str, float]:
        place = said.place(sample.target)
        return {"nll": said.nll(sample.target), "recall": float(place == 1), "mrr": 1 / place}

    def truth(self, sample: Sample) -> Ranked:
        others = tuple(text for text in sample.about.get("others", ()) if text != sample.target)
        return Ranked((sample.target, *others), torch.tensor([20.0, *[0.0] * len(others)]))

    def matched(self, samples: Sequence[Sample], by: str) -> list[Ranked]:
        """Replies as BM25 scores them for the ``words`` of the context, or the encoder as published for its meaning."""
        texts = [(*one.about.get("others", ()), one.target) for one in samples]
        every = list(dict.fromkeys(text for some in texts for text in some))
        contexts = [" ".join(one.inputs) for one in samples]
        if by == "words":
            index = BM25([words(text) for text in every])
            scores = [torch.from_numpy(index.scores(words(text))) for text in contexts]
        else:
            model, tokenizer = published(self.encoder), tokens(self.encoder)
            known = embedded_texts(model, tokenizer, every)
            scores = list(embedded_texts(model, tokenizer, contexts) @ known.T)
        place = {text: i for i, text in enumerate(every)}
        return [Ranked(some, row[[place[text] for text in some]]) for some, row in zip(texts, scores, strict=True)]

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: tokens(self.encoder)) or super().unsupported_reason(run)


def fewer(batch: Batch, negatives: int) -> Batch:
    """The right reply of each context and so many behind it, in a circle."""
    count = batch["candidates"].shape[1]
    steps = torch.arange(min(negatives + 1, count), device=batch["right"].device)
    kept = (batch["right"][:, None] + steps) % count
    chosen = {name: batch[name].gather(1, kept) for name in ("candidates", "offered")}
    return {**batch, **chosen, "right": torch.zeros_like(batch["right"])}


def _masked(scores: Tensor, batch: Batch) -> Tensor:
    return scores.float().masked_fill(~batch["offered"], float("-inf"))


def _same(text: str) -> str:
    """What two replies of the same words share."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _public() -> list[tuple[Part, str, list[str], range]]:
    """Dialogues by part: one in five of ESConv's dev part validates, its test part tests, all else trains."""
    found: list[tuple[Part, str, list[str], range]] = []
    for source in ("esconv", "esconv-dev", "esconv-test"):
        for n, turns in enumerate(dialogues(2, source)):
            few: Part = "validation" if n % 5 == 0 else "train"
            part: Part = {"esconv": "train", "esconv-dev": few}.get(source, "test")  # type: ignore[assignment]
            found.append((part, f"{source} {n}", [one["content"] for one in turns], range(1, len(turns), 2)))
    return found


def _own(folder: Path) -> list[tuple[Part, str, list[str], range]]:
    """Dialogues of a user's folder; every message but the first is a reply."""
    texts = {path.stem: [line for line in _lines(path) if line] for path in sorted(folder.glob("*.txt"))}
    texts = {name: messages for name, messages in texts.items() if len(messages) > 1}
    if not texts:
        raise UserError(f"{folder} holds no dialogue of two messages or more; give {ResponseSelection.takes}")
    parts = parted(list(texts))
    return [(parts[name], name, messages, range(1, len(messages))) for name, messages in texts.items()]


def _lines(path: Path) -> list[str]:
    try:
        return [" ".join(line.split()) for line in path.read_text("utf-8").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text; give a message a line") from error
