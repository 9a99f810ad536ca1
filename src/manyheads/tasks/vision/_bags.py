# SPDX-License-Identifier: Apache-2.0
"""Models of a bag of instances: a layer over instances, and what makes one vector of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "AttentionPool",
    "BagModel",
    "BagReading",
    "BagTransformer",
    "BlockPool",
    "DualStream",
    "MaxPool",
    "MeanPool",
]


class BagReading(NamedTuple):
    """What a model made of bags.

    Attributes:
        logits: ``[B, 2]``.
        state: one vector of each bag, ``[B, S]``.
        scores: how much each instance counts, by head, ``[B, H, N]``; -inf where none is.
    """

    logits: Tensor
    state: Tensor
    scores: Tensor


class BagModel(nn.Module):
    """Instances ``[B, N, F]``, of which ``mask [B, N]`` is True -> logits ``[B, 2]``.

    Args:
        pool: ``pool(h [B, N, width], mask) -> BagReading``.
        mean, deviation: of the features of the training part, ``[F]``.
        width: of what the layer makes of an instance.
        dropout: behind that layer.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, pool: nn.Module, mean: Tensor, deviation: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.features = nn.Sequential(nn.Linear(len(mean), width), nn.ReLU(), nn.Dropout(dropout))
        self.pool = pool

    def read(self, inputs: Tensor, mask: Tensor) -> BagReading:
        """Logits, state and scores; instances where the mask is False change nothing."""
        found: BagReading = self.pool(self.features((inputs - self.mean) / self.deviation), mask)
        return found

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        return self.read(inputs, mask).logits


def _hidden(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores ``[B, ..., N]`` with -inf where no instance is."""
    return scores.masked_fill(~mask.view(len(mask), *(1,) * (scores.ndim - 2), -1), -math.inf)


class AttentionPool(nn.Module):
    """ABMIL (Ilse et al., arXiv 1802.04712): ``a = softmax(w tanh(V h))``, or gated, ``w (tanh(V h) * sigmoid(U h))``.

    The state is ``sum a h``; the scores are a. Without biases, as in the released code of MHIM-MIL.
    """

    def __init__(self, width: int, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.v, self.w = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, 1, bias=False)
        self.u = nn.Linear(width, hidden, bias=False) if gated else None
        self.head = nn.Linear(width, 2)

    def forward(self, h: Tensor, mask: Tensor) -> BagReading:
        seen = self.v(h).tanh()
        if self.u is not None:
            seen = seen * self.u(h).sigmoid()
        weights = _hidden(self.w(seen).mT, mask).softmax(-1)
        state = (weights @ h).squeeze(1)
        return BagReading(self.head(state), state, _hidden(weights, mask))


class MeanPool(nn.Module):
    """The mean of all instances, which all count alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, h: Tensor, mask: Tensor) -> BagReading:
        weights = (mask.to(h.dtype) / mask.sum(1, keepdim=True))[:, None]
        state = (weights @ h).squeeze(1)
        return BagReading(self.head(state), state, _hidden(weights, mask))


class MaxPool(nn.Module):
    """A bag is what its most positive instance is; the score of an instance is the log-odds of its being positive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, h: Tensor, mask: Tensor) -> BagReading:
        logits = self.head(h)
        scores = _hidden((logits[..., 1] - logits[..., 0])[:, None], mask)
        rows, at = torch.arange(len(h), device=h.device), scores[:, 0].argmax(1)
        return BagReading(logits[rows, at], h[rows, at], scores)


class DualStream(nn.Module):
    """DSMIL (Li et al., arXiv 2011.08939): the highest instance of each class, and attention to what is like it.

    Logits are the mean of both streams. An instance's score is its highest logit, as in the code of MHIM-MIL.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.instance, self.query = nn.Linear(width, 2), nn.Linear(width, hidden)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, h: Tensor, mask: Tensor) -> BagReading:
        logits = _hidden(self.instance(h).mT, mask)  # [B, 2, N]
        highest, at = logits.max(-1)
        q = self.query(h)
        critical = q.gather(1, at[..., None].expand(-1, -1, q.shape[-1]))  # [B, 2, hidden]
        weights = _hidden(critical @ q.mT / math.sqrt(q.shape[-1]), mask).softmax(-1)
        state = (weights @ h).flatten(1)
        return BagReading((highest + self.head(state)) / 2, state, logits.max(1, keepdim=True).values)


class BagTransformer(nn.Module):
    """A class token and layers ``x + MSA(LN(x))`` over instances, as TransMIL's (arXiv 2106.00908).

    TransMIL approximates attention (Nyström) and folds instances into a square for its positions (PPEG). Here attention
    is exact, and there are no positions, for the instances of a bag have no order. Scores are the weights by which the
    class token reads instances in the first layer, ``[B, heads, N]``.
    """

    def __init__(self, width: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.enter, self.token = nn.Linear(width, dim), nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers + 1))
        self.layers = nn.ModuleList(nn.MultiheadAttention(dim, heads, dropout, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(dim, 2)

    def forward(self, h: Tensor, mask: Tensor) -> BagReading:
        x = torch.cat((self.token.expand(len(h), 1, -1).to(h.dtype), self.enter(h)), 1)
        absent = ~torch.cat((mask.new_ones(len(h), 1), mask), 1)
        scores = x.new_zeros(())
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=False)):
            normed = norm(x)
            added, weights = layer(normed, normed, normed, absent, need_weights=i == 0, average_attn_weights=False)
            x = x + added
            scores = weights[:, :, 0, 1:] if i == 0 else scores
        state = self.norms[-1](x[:, 0])
        return BagReading(self.head(state), state, _hidden(scores, mask))


class BlockPool(nn.Module):
    """Blocks over instances, ``block(x [B, N, dim], mask) -> [B, N, dim]``, and their mean."""

    def __init__(self, blocks: Sequence[nn.Module], width: int, dim: int) -> None:
        super().__init__()
        self.enter, self.blocks, self.pool = nn.Linear(width, dim), nn.ModuleList(blocks), MeanPool(dim)

    def forward(self, h: Tensor, mask: Tensor) -> BagReading:
        x = self.enter(h)
        for block in self.blocks:
            x = block(x, mask)
        found: BagReading = self.pool(x, mask)
        return found
