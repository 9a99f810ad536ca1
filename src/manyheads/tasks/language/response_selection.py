# SPDX-License-Identifier: Apache-2.0
"""Response selection: which of several replies is the one that a dialogue went on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.masks import padded
from ...data.ranking import words
from ...errors import UserError, refusal
from ...experiment import RunContext
from ...recipe import Batch, Recipe, Sample
from .._embedded import embedded_texts
from ..training._rankings import BM25
from ._dialogues import DialogueTask, Ranked
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


@dataclass(frozen=True, kw_only=True)
class ResponseSelection(DialogueTask):
    """Real dialogues of ESConv: each reply of a supporter among replies of other dialogues.

    Training is by in-batch negatives: the candidates of a context are its own reply and those of the other samples that
    were drawn with it. A cross-encoder has ``negatives`` of them, for it reads every pair. In the validation and the
    test part a context has ``candidates`` replies, its own and others drawn once from other dialogues of that part,
    without those of the same words. The rate is chosen by the held-out loss, which needs fewer samples than recall.

    Reference models are bi-encoders of mean outputs (``bi_encoder``) or first outputs (``first_token``), and a
    ``cross_encoder``.

    Attributes:
        context_tokens, reply_tokens: that are read, the last of a context and the first of a reply.
        negatives: replies beside the right one in a cross-encoder's training.
        start: weights of the encoder: ``published`` (MiniLM's, of its lowest layers where ``layers`` says fewer),
            ``random``, or ``auto``, published where ``dim`` and ``heads`` are its own.
        tied: one encoder for contexts and replies; the paper has two that start alike.
        still: lowest layers that learn nothing, nor do the embeddings then; 0 lets all learn.
        label: what it is called where an experiment has it several times.
    """

    published: ClassVar[tuple[str, ...]] = ("all-minilm-l6-v2",)
    references: ClassVar[tuple[str, ...]] = ("bi_encoder", "first_token", "cross_encoder")
    encoder: ClassVar[str] = "all-minilm-l6-v2"

    dim: int = 384
    layers: int = 6
    heads: int = 12
    rates: tuple[float, ...] = (5e-5, 2e-4)
    samples_judged: int = 400
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
