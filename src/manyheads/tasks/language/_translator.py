# SPDX-License-Identifier: Apache-2.0
"""Transformers that read sentences in several languages and write one: encoders, and a decoder that attends to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ...attention.multihead import MultiHead

__all__ = ["BEGIN", "END", "ROOM", "OneSource", "Several", "Translator"]

PAD, BEGIN, END = 0, 1, 2  # the first numbers of every vocabulary
ROOM = 48  # tokens of a sentence at most, with its begin or end


class OneSource(nn.Module):
    """The usual cross-attention, ``q + Drop(MHA(LN(q), H))``, to the only source, or to one of several."""

    def __init__(self, dim: int, heads: int, dropout: float, which: int = 0) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(dim), MultiHead(dim, heads, dropout)
        self.which, self.rate = which, dropout

    def forward(self, q: Tensor, states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        found = self.attend(self.norm(q), states[self.which], masks[self.which])
        return q + dropout(found, self.rate, self.training)


class _Encoder(nn.Module):
    """Rows ``[B, S, D]`` with masks, as they are read by those who attend to them; ``causal``: from first to last."""

    def __init__(self, task: Any, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                task.dim, task.heads, width, task.dropout, "gelu", batch_first=True, norm_first=True
            ) for _ in range(task.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(task.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        unseen = ~(mask | ~mask.any(1, keepdim=True))  # a source that is not there is read, and attended to by none
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        for layer in self.layers:
            x = layer(x, later, unseen)
        found: Tensor = self.norm(x)
        return found


class _Decoder(nn.Module):
    """Attention to what was written, attention to sources, feed-forward; norms before each."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float, sources: nn.Module) -> None:
        super().__init__()
        self.norm, self.attend, self.sources = nn.LayerNorm(dim), MultiHead(dim, heads, dropout), sources
        self.rate = dropout
        self.inner = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim),
            nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor, states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = self.norm(x)
        x = x + dropout(self.attend(y, y, before[None].expand(len(x), -1, -1)), self.rate, self.training)
        x = self.sources(x, states, masks)
        made: Tensor = x + self.inner(x)
        return made


class Translator(nn.Module):
    """Sources ``N x [B, S_i]`` with masks, and words ``[B, T]`` -> log probabilities of the next ones ``[B, T, V]``.

    Embeddings are shared by all languages and tied to the output. A source that is not there is masked whole.

    Args:
        task: gives sizes and vocabulary.
        width: of every feed-forward.
        sources: makes the attention to sources of a decoder's layer.
        reads: the numbers of the sources that are encoded, each by an encoder of its own.
        joined: all are one row of tokens, read by one encoder.
        causal: encoders read from first to last, so that what follows changes no state.
    """

    def __init__(
        self, task: Any, width: int, sources: Callable[[], nn.Module], reads: Sequence[int], joined: bool = False,
        causal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        dim, self.reads, self.joined = task.dim, tuple(reads), joined
        self.words, self.places = (
            nn.Embedding(task.vocabulary, dim),
            nn.Embedding(ROOM * (len(self.reads) if joined else 1), dim),
        )
        nn.init.normal_(self.words.weight, std=dim**-0.5)
        self.encoders = nn.ModuleList(_Encoder(task, width, causal) for _ in range(1 if joined else len(self.reads)))
        self.decoder = nn.ModuleList(
            _Decoder(dim, task.heads, width, task.dropout, sources()) for _ in range(task.layers)
        )
        self.norm, self.rate = nn.LayerNorm(dim), task.dropout

    def _embedded(self, words: Tensor, first: int = 0) -> Tensor:
        x = self.words(words) * self.words.embedding_dim**0.5
        places = torch.arange(first, first + words.shape[1], device=words.device)
        return dropout(x + self.places(places), self.rate, self.training)

    def read(self, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        """States and masks of the sources of a batch, by its ``source_i``, ``mask_i`` and ``there [B, N]``."""
        rows = [batch[f"source_{i}"] for i in self.reads]
        masks = [batch[f"mask_{i}"] & batch["there"][:, i, None] for i in self.reads]
        seen = [self._embedded(row, ROOM * i if self.joined else 0) for i, row in enumerate(rows)]
        if self.joined:  # each source has places of its own, however long the one before it is
            seen, masks = [torch.cat(seen, 1)], [torch.cat(masks, 1)]
        return [encode(x, mask) for encode, x, mask in zip(self.encoders, seen, masks, strict=True)], masks

    def write(self, states: Sequence[Tensor], masks: Sequence[Tensor], words: Tensor) -> Tensor:
        """Log probabilities of the words that follow."""
        x = self._embedded(words)
        for layer in self.decoder:
            x = layer(x, states, masks)
        found: Tensor = (self.norm(x) @ self.words.weight.T).float().log_softmax(-1)
        return found

    def forward(self, batch: Any, words: Tensor) -> Tensor:
        return self.write(*self.read(batch), words)


class Several(nn.Module):
    """Models of their own, each with a share of the parameters: the mean of their probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def read(self, batch: Any) -> list[Any]:
        """What each reads."""
        models: Any = self.models
        return [model.read(batch) for model in models]

    def write(self, *read_and_words: Any) -> Tensor:
        """Log probabilities of the words that follow."""
        *read, words = read_and_words
        models: Any = self.models
        each = [model.write(*one, words) for model, one in zip(models, read, strict=True)]
        return torch.stack(each).logsumexp(0) - torch.tensor(float(len(each))).log()

    def forward(self, batch: Any, words: Tensor) -> Tensor:
        return self.write(*self.read(batch), words)
