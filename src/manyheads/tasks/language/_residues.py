# SPDX-License-Identifier: Apache-2.0
"""Models of residues: all of a peptide at once from masks, or one after the other.

A batch has ``tokens``, ``mask`` and ``binder [B, T]``: begin, protein, peptide, end; True where a token is, and where
the peptide is. Every model has ``logits(batch) -> [B, T, VOCABULARY]`` of the tokens of the peptide, which do not see
what they are asked for; ``draw(batch, generator) -> tokens`` with a new peptide; and ``perplexity(batch)`` of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.positions import sinusoids
from ...data.proteins import FIRST, MASK, VOCABULARY
from ...recipe import Batch
from .._blocks import Transformer

__all__ = ["Continued", "Masked", "MaskedResidues", "drawn"]


def drawn(logits: Tensor, top: int, generator: torch.Generator) -> Tensor:
    """A residue of each of ``logits [N, VOCABULARY]``, among its ``top`` likeliest, X left out; on the CPU."""
    values, ids = logits.float().cpu()[:, FIRST : VOCABULARY - 1].topk(top)
    return ids.gather(1, torch.multinomial(values.softmax(-1), 1, generator=generator))[:, 0] + FIRST


class Masked(nn.Module):
    """A model that reads masks, ``read(tokens, mask) -> [B, T, VOCABULARY]``; ``top`` residues are drawn among."""

    def __init__(self, read: nn.Module, top: int = 3) -> None:
        super().__init__()
        self.read, self.top = read, top

    def logits(self, batch: Batch) -> Tensor:
        """Of all residues of a peptide, of which none is seen."""
        found: Tensor = self.read(batch["tokens"].masked_fill(batch["binder"], MASK), batch["mask"])
        return found

    def draw(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """All residues at once, each by itself."""
        there: Tensor = batch["binder"]
        tokens: Tensor = batch["tokens"].clone()
        tokens[there] = drawn(self.logits(batch)[there], self.top, generator).to(tokens.device)
        return tokens

    def perplexity(self, batch: Batch) -> float:
        """Pseudo-perplexity of the peptide of one row: each residue is masked by itself, and the others are seen."""
        places = batch["binder"][0].nonzero()[:, 0]
        each = torch.arange(len(places), device=places.device)
        rows = batch["tokens"].repeat(len(places), 1)
        right = rows[each, places]
        rows[each, places] = MASK
        logs = self.read(rows, batch["mask"].expand_as(rows))[each, places].float().log_softmax(-1)
        return math.exp(-float(logs.gather(1, right[:, None]).mean()))


class MaskedResidues(nn.Module):
    """Embeddings of residues and places, blocks, and a head."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim, padding_idx=0)
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + sinusoids(torch.arange(x.shape[1], device=x.device), x.shape[2]).to(x)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Continued(nn.Module):
    """A protein read from both sides, and the peptide from left to right, in one Transformer (a prefix language model).

    Places of a peptide are counted from its own first residue, and an embedding says which part a residue is of.
    """

    top: int = 3

    def __init__(self, dim: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.embedding, self.parts = nn.Embedding(VOCABULARY, dim, padding_idx=0), nn.Embedding(2, dim)
        self.blocks = nn.ModuleList(Transformer(dim, heads, width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY)

    def logits(self, batch: Batch) -> Tensor:
        """At the place of each token what the token before it, and all of the protein, say of it."""
        tokens, mask, binder = batch["tokens"], batch["mask"], batch["binder"]
        at = torch.arange(tokens.shape[1], device=tokens.device)
        places = torch.where(binder, binder.cumsum(1) - 1, at)
        x = self.embedding(tokens) + self.parts(binder.long())
        x = x + sinusoids(places.flatten(), x.shape[2]).view_as(x).to(x)
        behind = binder | (at > (binder * at).amax(1, keepdim=True))  # the peptide, and the end behind it
        seen = mask[:, None] & (~behind[:, None] | (at[None, :] <= at[:, None]))
        blocked = (~seen | ~mask[:, :, None]) & ~torch.eye(len(at), dtype=torch.bool, device=at.device)
        blocked = blocked.repeat_interleave(self.heads, 0)
        for block in self.blocks:
            x = nn.TransformerEncoderLayer.forward(block, x, src_mask=blocked)  # type: ignore[arg-type]
        logits: Tensor = self.head(self.norm(x))
        return logits.roll(1, 1)

    def draw(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """One residue after the other."""
        tokens: Tensor = batch["tokens"].clone()
        for place in batch["binder"][0].nonzero()[:, 0].tolist():
            following = self.logits({**batch, "tokens": tokens})[:, place]
            tokens[:, place] = drawn(following, self.top, generator).to(tokens.device)
        return tokens

    def perplexity(self, batch: Any) -> float:
        """Of the peptide of one row, each residue after those before it."""
        logs = self.logits(batch).float().log_softmax(-1).gather(-1, batch["tokens"][..., None])[..., 0]
        return math.exp(-float(logs[batch["binder"]].mean()))
