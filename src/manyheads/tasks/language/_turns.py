# SPDX-License-Identifier: Apache-2.0
"""Words of the turns of dialogues as vectors, and models that label each turn by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...data.ranking import words
from ...domains.language.resper import UtteranceEncoder, start_linear
from ...recipe import Batch, Sample

__all__ = [
    "ConvEncoder", "FlatModel", "Published", "convolutions", "flat_bigru", "stacked", "state_width", "vocabulary",
    "word_ids", "word_states",
]  # fmt: skip

_AT_ONCE = 12  # texts that the encoder reads together
_RARE = 2  # times that a word stands in training, to have an embedding of its own


@cache
def _reader(encoder: str) -> tuple[Any, Any]:
    from ...models import load_reader

    with torch.device("cpu"):  # where a model is built to count its parameters, nothing else has values
        return load_reader(encoder, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def state_width(encoder: str) -> int:
    """Numbers of a state."""
    return int(_reader(encoder)[0].config.hidden_size)


@lru_cache(maxsize=4096)
@torch.no_grad()
def word_states(encoder: str, texts: tuple[str, ...], most: int) -> tuple[Tensor, ...]:
    """Last hidden states of the first ``most`` tokens of each text ``[T, D]``, float16, of a frozen encoder.

    Raises:
        UserError: the encoder cannot be had.
    """
    model, tokenizer = _reader(encoder)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that little is filled up
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), _AT_ONCE):
        some = order[first : first + _AT_ONCE]
        given = tokenizer([texts[i] for i in some], padding=True, truncation=True, max_length=most,
                          return_tensors="pt").to(model.device)  # fmt: skip
        states, counts = model(**given).last_hidden_state.half().cpu(), given["attention_mask"].sum(1).tolist()
        found |= {i: row[:n].clone() for i, row, n in zip(some, states, counts, strict=True)}
    return tuple(found[i] for i in range(len(texts)))


@lru_cache(maxsize=32)
def vocabulary(samples: tuple[Sample, ...]) -> dict[str, int]:
    """Numbers of the words of training dialogues, from 1; 0 is any other."""
    counts = Counter(word for sample in samples for text in sample.inputs for word in words(text))
    kept = sorted(word for word, count in counts.items() if count >= _RARE)
    return {word: i + 1 for i, word in enumerate(kept)}


def word_ids(known: dict[str, int], text: str, most: int) -> Tensor:
    """Numbers of the first ``most`` words of a text, one at least."""
    return torch.tensor([known.get(word, 0) for word in words(text)[:most]] or [0])


class Published(nn.Module):
    """A layer from a frozen encoder's states to ``dim``."""

    def __init__(self, encoder: str, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(state_width(encoder), dim)

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.project(states.float())
        return found


class ConvEncoder(nn.Module):
    """The maximum over words of ReLUs of filters over 3, 4 and 5 words, ``width`` each: ``[U, T, dim] -> [U, 3 w]``."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(dim, width, size, padding=size // 2) for size in (3, 4, 5))

    def forward(self, found: Tensor, mask: Tensor) -> Tensor:
        given = (found * mask[..., None]).mT
        made = torch.cat([one(given)[..., : mask.shape[1]] for one in self.filters], 1).relu()
        return made.masked_fill(~mask[:, None], 0.0).amax(-1)


class FlatModel(nn.Module):
    """Logits ``[B, N, classes]`` of own turns, each by its words alone; 0 of all others."""

    def __init__(self, words: nn.Module, encoder: nn.Module, made: int, classes: int, rate: float) -> None:
        super().__init__()
        self.words, self.encoder = words, encoder
        self.last, self.drop = nn.Linear(made, classes), nn.Dropout(rate)
        start_linear(self.last)

    def forward(self, batch: Batch) -> Tensor:
        own = batch["own"] & batch["mask"]
        found = self.encoder(self.words(batch["words"][own]), batch["word_mask"][own])
        logits: Tensor = self.last(self.drop(found))
        return logits.new_zeros(*own.shape, logits.shape[-1]).masked_scatter(own[..., None], logits)


def flat_bigru(words: nn.Module, dim: int, width: int, classes: int, rate: float) -> nn.Module:
    """A BiGRU over the words of a turn."""
    return FlatModel(words, UtteranceEncoder(dim, width, "base"), width, classes, rate)


def convolutions(words: nn.Module, dim: int, width: int, classes: int, rate: float) -> nn.Module:
    """Filters over the words of a turn (Kim, 2014)."""
    return FlatModel(words, ConvEncoder(dim, width), 3 * width, classes, rate)


def stacked(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Words of turns ``B x N_i x [T_ij, ...]``, filled up to ``[B, N, T, ...]``, and where they are ``[B, N, T]``."""
    count, longest = max(map(len, rows)), max(len(one) for row in rows for one in row)
    first = rows[0][0]
    found = first.new_zeros(len(rows), count, longest, *first.shape[1:])
    there = torch.zeros(len(rows), count, longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        for n, one in enumerate(row):
            found[b, n, : len(one)] = one
            there[b, n, : len(one)] = True
    return found, there
