# SPDX-License-Identifier: Apache-2.0
"""Poolers: one vector of the states of a text's tokens.

A pooler is a module. ``forward(states, mask)`` is given the last states ``[B, T, D]``, or where ``all_layers`` is true
those of all layers ``[B, L, T, D]``, and a mask ``[B, T]`` that is true for tokens and false for padding, on whichever
side that is; it gives ``[B, D]``. What padding holds changes nothing. Every text has a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

__all__ = ["Ends", "Mean", "Memory", "Pooler", "Probe", "attend", "last", "mean"]


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens: states ``[..., T, D]`` and a mask that fits ``[..., T]``."""
    weight = mask[..., None].to(states.dtype)
    found: Tensor = states.masked_fill(~mask[..., None], 0).sum(-2) / weight.sum(-2)
    return found


def last(states: Tensor, mask: Tensor) -> Tensor:
    """The last token of each text: states ``[B, ..., T, D]``, mask ``[B, T]``; ``[B, ..., D]``."""
    at = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), ..., at, :]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of ``heads`` heads: q ``[B, M, E]``, k and v ``[B, T, E]``, mask ``[B, T]``; ``[B, M, E]``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    seen = None if mask is None else mask[:, None, None]
    found: Tensor = attention(q, k, v, seen).transpose(1, 2).flatten(2)
    return found


class Pooler(nn.Module):
    """Base of poolers.

    Attributes:
        all_layers: whether it is given the states of all layers.
        standard: its name among sentence-transformers' poolings, None where they have none.
    """

    all_layers: bool = False
    standard: str | None = None


class Mean(Pooler):
    """The mean over all tokens."""

    standard = "mean"

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return mean(states, mask)


class Ends(Pooler):
    """The mean over the first or the last tokens.

    Args:
        count: how many; of a shorter text all.
        last: whether they are the last.
    """

    def __init__(self, count: int = 1, last: bool = True) -> None:
        super().__init__()
        self.count, self.last = count, last
        self.standard = None if count > 1 else "lasttoken" if last else "cls"

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        number = mask.long().cumsum(1)  # of a token in its text, from 1
        near = number > number[:, -1:] - self.count if self.last else number <= self.count
        return mean(states, mask & near)


class Probe(Pooler):
    """Cross-attention of learned queries to the tokens: ``mean_p O softmax(p (K h)^T / sqrt(d)) V h``.

    Probes begin at zero, V and O as the identity: the pooler begins as the mean.

    Args:
        width: D.
        heads: of D / heads channels.
        count: queries, whose answers are averaged.
    """

    def __init__(self, width: int, heads: int = 1, count: int = 1) -> None:
        super().__init__()
        self.heads, self.probes = heads, nn.Parameter(torch.zeros(count, width))
        self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(3))
        for part in (self.v, self.o):
            nn.init.eye_(part.weight)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states.masked_fill(~mask[..., None], 0)
        probes = self.probes.expand(len(states), -1, -1)
        found: Tensor = self.o(attend(probes, self.k(states), self.v(states), self.heads, mask)).mean(1)
        return found


class Memory(Pooler):
    """Attention of the tokens to learned keys and values, averaged: ``mean_t h_t + O softmax(Q h_t K^T / sqrt(d)) V``.

    O begins at zero: the pooler begins as the mean.

    Args:
        width: D.
        heads: of D / heads channels.
        count: keys.
    """

    def __init__(self, width: int, heads: int = 1, count: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.keys, self.values = (nn.Parameter(torch.randn(count, width) * 0.02) for _ in range(2))
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.o.weight)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states.masked_fill(~mask[..., None], 0)
        keys, values = (x.expand(len(states), -1, -1) for x in (self.keys, self.values))
        return mean(states + self.o(attend(self.q(states), keys, values, self.heads)), mask)
