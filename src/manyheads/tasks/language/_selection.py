# SPDX-License-Identifier: Apache-2.0
"""Models that score replies for a context: two texts apart (bi-encoder), or both at once (cross-encoder)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...recipe import Batch
from ..speech._understanding import take

__all__ = [
    "CrossEncoder",
    "DualEncoder",
    "Pooled",
    "TextEncoder",
    "context_tokens",
    "pooled",
    "published",
    "reply_tokens",
    "tokens",
]

Pool = Literal["mean", "first"]
_LONGEST = 512  # tokens that have a position
_AT_ONCE = 64  # texts that are read together where nothing is learned


@cache
def tokens(name: str) -> Any:
    """The tokenizer of a published encoder."""
    from ...models import tokenizer

    return tokenizer(name)


@lru_cache(maxsize=100_000)
def _ids(name: str, text: str) -> tuple[int, ...]:
    return tuple(tokens(name)(text, add_special_tokens=False, verbose=False)["input_ids"])


def context_tokens(name: str, messages: Sequence[str], most: int) -> Tensor:
    """Ids of ``[CLS] message [SEP] message [SEP]``, of which the last ``most - 1`` are kept behind ``[CLS]``."""
    known = tokens(name)
    found = [i for message in messages for i in (*_ids(name, message), known.sep_token_id)]
    return torch.tensor([known.cls_token_id, *found[1 - most :]])


def reply_tokens(name: str, reply: str, most: int) -> Tensor:
    """Ids of ``[CLS] reply [SEP]``, of whose reply the first ``most - 2`` are kept."""
    known = tokens(name)
    return torch.tensor([known.cls_token_id, *_ids(name, reply)[: most - 2], known.sep_token_id])


def pooled(states: Tensor, mask: Tensor, how: Pool) -> Tensor:
    """One vector ``[N, D]`` of a text's states ``[N, T, D]``: their mean, or the first."""
    if how == "first":
        return states[:, 0]
    weights = mask[..., None].to(states.dtype)
    return (weights * states).sum(1) / weights.sum(1).clamp(min=1)


class TextEncoder(nn.Module):
    """BERT, and a feed-forward part of ``width`` behind it: ids ``[N, T]`` -> states ``[N, T, dim]``.

    That part adds nothing before it has learned; it is there so that models of several kinds can have as many
    parameters as each other. Padding may stand anywhere: positions count what is there. Of random weights the last
    normalisation gives states of the length ``dim ** 0.25``, about that of a mean of MiniLM's, so that products of two
    of them are small enough for a softmax.

    Args:
        dim, layers, heads, dropout, width: sizes.
        vocabulary: tokens.
        still: so many of the lowest layers learn nothing, and neither do the embeddings; 0 lets all learn.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, dropout: float, width: int, vocabulary: int, still: int = 0
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        kind: Any = BertConfig
        config = kind(
            vocab_size=vocabulary, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * dim, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            max_position_embeddings=_LONGEST,
        )  # fmt: skip
        inside: Any = BertModel(config, add_pooling_layer=False)
        self.inside = inside
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.constant_(inside.encoder.layer[-1].output.LayerNorm.weight, dim**-0.25)
        self._still = [inside.embeddings, *inside.encoder.layer[:still]] if still else []
        for part in self._still:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> TextEncoder:
        """As of any module; what learns nothing drops nothing out either."""
        super().train(mode)
        for part in self._still:
            part.eval()
        return self

    def load_published(self, name: str, shape: dict[str, int]) -> None:
        """Take the weights of a published encoder of this ``shape``, of its lowest layers where there are more.

        Raises:
            UserError: it cannot be had, or has another shape.
        """
        found = published(name)
        has = {"dim": found.config.hidden_size, "heads": found.config.num_attention_heads}
        take(self.inside, found, name, shape, {**has, "layers": len(found.encoder.layer)})

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        """States; ``kinds [N, T]`` is 1 for tokens of a second text."""
        if not torch.is_grad_enabled() and len(ids) > _AT_ONCE:
            parts = [slice(i, i + _AT_ONCE) for i in range(0, len(ids), _AT_ONCE)]
            return torch.cat([self(ids[p], mask[p], None if kinds is None else kinds[p]) for p in parts])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        states = self.inside(
            input_ids=ids, attention_mask=mask.long(), token_type_ids=kinds, position_ids=places
        ).last_hidden_state  # fmt: skip
        found: Tensor = states + self.down(nn.functional.gelu(self.up(states)))
        return found


@lru_cache(maxsize=1)
def published(name: str) -> Any:
    from ...models import load_reader

    return load_reader(name, "cpu", torch.float32)[0]


class Pooled(nn.Module):
    """A context's states as one vector, and its product with those of replies: what makes a bi-encoder."""

    def __init__(self, how: Pool) -> None:
        super().__init__()
        self.how: Pool = how

    def vectors(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors ``[B, 1, D]`` of states ``[B, N, D]``, and which of them are there ``[B, 1]``."""
        return pooled(states, mask, self.how)[:, None], mask.any(1, keepdim=True)

    def scores(self, vectors: Tensor, there: Tensor, replies: Tensor) -> Tensor:
        """``[B, C]`` of vectors ``[B, 1, D]`` and replies ``[B, C, D]``."""
        return (replies @ vectors.mT)[..., 0]


class DualEncoder(nn.Module):
    """Contexts and replies are read apart, so that the vectors of replies can be kept and met by any context.

        kept = model.replies(ids, mask)                      # once
        vectors, there = model.contexts(ids, mask)           # of a context
        scores = model.match.scores(vectors, there, kept[None])

    Args:
        encoder: of both; with ``second`` of contexts alone.
        match: makes vectors of a context, and scores of them and a reply's vector, as :class:`Pooled` does.
        pool: of replies.
        second: encoder of replies.
    """

    def __init__(self, encoder: TextEncoder, match: nn.Module, pool: Pool, second: TextEncoder | None = None) -> None:
        super().__init__()
        self.encoder, self.second, self.pool = encoder, second, pool
        self.match: Any = match

    def contexts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors ``[B, m, D]`` of contexts ``[B, N]``, and which of them are there ``[B, m]``."""
        found: tuple[Tensor, Tensor] = self.match.vectors(self.encoder(ids, mask), mask)
        return found

    def replies(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors ``[R, D]`` of replies ``[R, M]``."""
        return pooled((self.second or self.encoder)(ids, mask), mask, self.pool)

    def forward(self, batch: Batch) -> Tensor:
        """Scores ``[B, C]``; each reply of the batch is read once."""
        vectors, there = self.contexts(batch["inputs"], batch["mask"])
        replies = self.replies(batch["replies"], batch["reply_mask"])
        scores: Tensor = self.match.scores(vectors, there, replies[batch["candidates"]])
        return scores


class CrossEncoder(nn.Module):
    """Context and reply are read as one text, ``score = w . first state``: every pair anew."""

    def __init__(self, encoder: TextEncoder, dim: int) -> None:
        super().__init__()
        self.encoder, self.score = encoder, nn.Linear(dim, 1)

    def pairs(self, batch: Batch, rows: Tensor, replies: Tensor) -> Tensor:
        """Scores ``[P]`` of contexts ``rows [P]`` with ``replies [P]``, both by number in the batch."""
        # A reply's [CLS] is left out: the context's is the first of both.
        second, second_mask = batch["replies"][replies, 1:], batch["reply_mask"][replies, 1:]
        first, first_mask = batch["inputs"][rows], batch["mask"][rows]
        kinds = torch.cat((torch.zeros_like(first), torch.ones_like(second)), 1)
        states = self.encoder(torch.cat((first, second), 1), torch.cat((first_mask, second_mask), 1), kinds)
        found: Tensor = self.score(states[:, 0])[..., 0]
        return found

    def forward(self, batch: Batch) -> Tensor:
        """Scores ``[B, C]``; 0 where a context has no such candidate."""
        rows, columns = batch["offered"].nonzero(as_tuple=True)
        replies = batch["candidates"][rows, columns]
        step = len(rows) if torch.is_grad_enabled() else _AT_ONCE
        parts = [self.pairs(batch, rows[i : i + step], replies[i : i + step]) for i in range(0, len(rows), step)]
        found = torch.cat(parts)
        return found.new_zeros(batch["offered"].shape).index_put((rows, columns), found)
