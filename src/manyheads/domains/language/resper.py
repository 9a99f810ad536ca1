# SPDX-License-Identifier: Apache-2.0
r"""RESPER: Computationally Modelling Resisting Strategies in Persuasive Conversations (EACL 2021).

Who is to be persuaded resists: asks for sources, pities himself, puts it off. Each turn is labelled as it comes, by its
words and by what was said before. With word vectors ``w_1 .. w_T`` of turn n, and [;] side by side:

    l, r     = GRU forwards, backwards (w)                                             d_h1 each
    u_n      = max over words of tanh(W [SA(l); l; w; r; SA(r)])                       d_h1
    c_1 .. n = GRU forwards (u)                                                        d_h2
    x_n      = tanh(W [SA_causal(c); c; u])                                            d_h2
    z_n      = W2 Drop(W1 [x_n; p]),   p = softmax(z_m), m the last own turn before n, 0 before the first
    SA(h)    = softmax(h h^T) h, unscaled: of words where there are words, of turns up to n

Own turns are those of who resists; the loss is the mean negative log-likelihood of them alone. ``p`` is the feedback of
``sent-conn-mask``. ``variant=f`` leaves out both SA, ``base`` the raw inputs w and u too. There is dropout before the
second GRU, before the classifier and in it.

Two differences from the released code, whose intention is followed: its causal mask multiplies scores by -1e10, so that
a negative score of a later turn takes all attention; and its maximum over words has padding among the words. Not here:
features of lexicons (affect, emotion, LIWC, sentiment), joined to x in some of its runs. The word vectors are the
task's: states of a published encoder that learn nothing, where the paper has BERT's, or embeddings that are learned;
brought to the task's ``dim`` by a layer that the paper does not have. d_h2 is ``dim`` and d_h1 the width that matches
parameters (paper: 300 each), a batch has several dialogues (paper: one), and linear layers start at Xavier's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...attention.reference import causal_mask, softmax
from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["DialogueModel", "Resper", "UtteranceEncoder", "self_attention", "start_linear"]

Variant = Literal["base", "f", "sf"]


def self_attention(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(h h^T) h [B, T, D]`` of states, and the weights ``[B, T, T]``; ``mask``, broadcast to those: seen."""
    weights = softmax(states @ states.mT, mask)
    return weights @ states, weights


def start_linear(layer: nn.Linear) -> None:
    """Xavier's weights: with torch's own, the scores behind four layers begin so small that they take long to grow."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


class UtteranceEncoder(nn.Module):
    """Words ``[U, T, dim]`` -> ``[U, hidden]``; ``mask [U, T]`` is True for the words, which come first.

    Args:
        dim, hidden: of words, d_h1.
        variant: what the words are joined from.
    """

    def __init__(self, dim: int, hidden: int, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.gru = nn.GRU(dim, hidden, batch_first=True, bidirectional=True)
        wide = {"base": 2 * hidden, "f": 2 * hidden + dim, "sf": 4 * hidden + dim}[variant]
        self.out = nn.Linear(wide, hidden)
        start_linear(self.out)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(words, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        context = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=words.shape[1])[0]
        left, right = context.chunk(2, -1)
        parts = [left, right] if self.variant == "base" else [left, words, right]
        if self.variant == "sf":
            seen = mask[:, None]
            parts = [self_attention(left, seen)[0], *parts, self_attention(right, seen)[0]]
        joined = torch.tanh(self.out(torch.cat([part.to(context.dtype) for part in parts], -1)))
        return joined.masked_fill(~mask[..., None], -torch.inf).amax(1)


class DialogueModel(nn.Module):
    """Logits ``[B, N, classes]`` of a batch of dialogues, each turn by itself and those before it.

    Args:
        words: from the words of a batch to vectors ``[U, T, dim]``.
        dim, width: of words and of the dialogue's states (d_h2); d_h1.
        hidden: of the classifier.
        classes: how many.
        variant: what vectors are joined from.
        feedback: scores of the last own turn go into the classifier.
        rate: of dropout.

    Attributes:
        shown: weights ``[B, N, N]`` of the turns in the last forward; kept where ``show`` is set.
    """

    def __init__(
        self, words: nn.Module, dim: int, width: int, hidden: int, classes: int, variant: Variant, feedback: bool,
        rate: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.variant, self.classes = variant, classes
        self.words, self.utterance = words, UtteranceEncoder(dim, width, variant)
        self.dialogue = nn.GRU(width, dim, batch_first=True)
        self.join = nn.Linear({"base": dim, "f": dim + width, "sf": 2 * dim + width}[variant], dim)
        self.first, self.last, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, classes), nn.Dropout(rate)
        # Columns of the first layer that the last own turn's scores meet, apart: the others are the same for all turns.
        self.told = nn.Linear(classes, hidden, bias=False) if feedback else None
        for layer in (self.join, self.first, self.last):
            start_linear(layer)
        self.show, self.shown = False, torch.empty(0)

    def forward(self, batch: Batch) -> Tensor:
        mask, word_mask = batch["mask"], batch["word_mask"][batch["mask"]]
        found = self.utterance(self.words(batch["words"][mask]), word_mask)
        spoken = found.new_zeros(*mask.shape, found.shape[-1]).masked_scatter(mask[..., None], found)
        return self.label(self.drop(spoken), mask, batch["own"])

    def label(self, spoken: Tensor, mask: Tensor, own: Tensor) -> Tensor:
        """Logits of turns by their vectors ``[B, N, width]``, of which ``mask [B, N]`` are there and ``own`` resist."""
        context = self.dialogue(spoken)[0]
        parts = [context] if self.variant == "base" else [context, spoken.to(context.dtype)]
        if self.variant == "sf":
            count = mask.shape[1]
            attended, weights = self_attention(context, causal_mask(count, count, mask.device) & mask[:, None])
            parts = [attended, *parts]
            if self.show:
                self.shown = weights.detach()
        hidden = self.first(self.drop(torch.tanh(self.join(torch.cat(parts, -1)))))
        if self.told is None:
            plain: Tensor = self.last(self.drop(hidden))
            return plain
        said, found = hidden.new_zeros(len(hidden), self.classes), []
        for n in range(hidden.shape[1]):
            found.append(self.last(self.drop(hidden[:, n] + self.told(said))))
            said = torch.where(own[:, n, None], found[-1].softmax(-1).to(said.dtype), said)
        return torch.stack(found, 1)


@dataclass(frozen=True, kw_only=True)
class Resper(Recipe):
    """Labels each turn of who resists persuasion, by attention over its words and over the turns so far.

    Attributes:
        variant: ``sf`` joins attended, hidden and raw vectors, ``f`` hidden and raw ones, ``base`` has hidden ones.
        feedback: scores of the last own turn go into the classifier.
        hidden: width of the classifier, d_fc.
    """

    task: ClassVar[str] = "resisting_strategies"

    variant: Variant = field(default="sf", metadata={"help": "sf: attended, hidden and raw vectors; f; base: hidden"})
    feedback: bool = field(default=True, metadata={"help": "scores of the last own turn go into the classifier"})
    hidden: Annotated[int, Field(ge=1)] = field(default=100, metadata={"help": "width of the classifier"})

    def build(self, task: FieldTask, width: int) -> nn.Module:
        known: Any = task
        if not hasattr(task, "words_of"):
            raise UserError("resper labels the turns of dialogues: give --task resisting_strategies")
        return DialogueModel(
            known.words_of(), task.dim, width, self.hidden, len(known.classes), self.variant, self.feedback,
            task.dropout,
        )  # fmt: skip

    def pictures(self, model: Any, batch: Batch) -> Sequence[Picture]:
        """Which earlier turns each own turn of the first dialogue attends to; none where no turn attends."""
        if self.variant != "sf":
            return ()
        model.show = True
        model(batch)
        model.show = False
        count = int(batch["mask"][0].sum())
        own = [n for n in range(count) if batch["own"][0, n]]
        values = model.shown[0, own, :count].float().cpu()
        rows, columns = [str(n + 1) for n in own], [str(n + 1) for n in range(count)]
        return (Picture("attention to turns", rows, columns, values.tolist(), ("own turns", "turns so far")),)
