# SPDX-License-Identifier: Apache-2.0
"""Self-attention over a window of prices, or attention over the states of an LSTM, in place of recurrence alone.

"Multi-Agent Stock Prediction Systems: Machine Learning Models, Simulations, and Real-Time Trading Strategies" (arXiv
2502.15853) compares recurrent networks with attention on one share. The paper was known from summaries alone; what
follows is the usual form of each.

- ``self``: days as tokens with learned positions, blocks x + MHA(LN(x)), x + FFN(LN(x)), in which a day sees itself
  and earlier ones; the last token is read.
- ``additive`` (Bahdanau): states h_i of an LSTM, weights softmax_i(v tanh(W [h_L; h_i])); ``dot`` (Luong):
  softmax_i(h_L W h_i). The context sum_i w_i h_i beside h_L goes into the last layer.

Choices of ours: the next day's log return in deviations is forecast, for by the paper's figure, 1 - |error| / price on
min-max scaled prices, "as today" is right to 98 %, and a scale taken from the whole series tells of its end. Left out:
sequence to sequence, agents and simulations.

Shapes: days ``x [B, L, 4]``, a forecast ``[B]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...recipe import Batch, Picture, Recipe

__all__ = ["AttentiveLSTM", "Block", "StockAttention"]


class Block(nn.Module):
    """One layer of causal self-attention, ``[B, L, D] -> [B, L, D]``.

    Attributes:
        shown: weights of the last day ``[B, L]`` in the last forward, the mean over heads.
    """

    def __init__(self, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim), nn.Dropout(dropout)
        )
        self.shown: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        h = self.norms[0](x)
        attended, weights = self.attention(h, h, h, attn_mask=later)
        self.shown = weights[:, -1].detach()
        x = x + attended
        out: Tensor = x + self.feedforward(self.norms[1](x))
        return out


class AttentiveLSTM(nn.Module):
    """An LSTM whose last state attends to all its states, ``[B, L, 4] -> [B]``; ``shown`` as :class:`Block` has."""

    def __init__(self, kind: str, features: int, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.network = nn.Linear(features, dim), nn.LSTM(dim, width, batch_first=True)
        self.score = nn.Linear(2 * width, dim) if kind == "additive" else nn.Linear(width, width, bias=False)
        self.v = nn.Linear(dim, 1, bias=False) if kind == "additive" else None
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, 1))
        self.shown: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Forecast ``[B]``, in deviations."""
        states = self.network(self.embed(x))[0]
        last = states[:, -1:]
        if self.v is not None:
            scores = self.v(self.score(torch.cat((last.expand_as(states), states), -1)).tanh())[..., 0]
        else:
            scores = (last * self.score(states)).sum(-1)
        weights = scores.softmax(-1)
        self.shown = weights.detach()
        context = (weights[..., None] * states).sum(1)
        out: Tensor = self.head(torch.cat((last[:, 0], context), -1))[:, 0]
        return out


@dataclass(frozen=True, kw_only=True)
class StockAttention(Recipe):
    """Attention over a window of prices.

    Attributes:
        model: self-attention of days, or an LSTM with additive or dot-product attention to its states.
    """

    task: ClassVar[str] = "stock_forecast"

    model: Literal["self", "additive", "dot"] = field(
        default="self", metadata={"help": "self, or an LSTM with additive or dot attention"}
    )

    def build(self, task: Any, width: int) -> nn.Module:
        if self.model == "self":
            return task.around([Block(task.dim, task.heads, width, task.dropout) for _ in range(task.layers)])  # type: ignore[no-any-return]
        return AttentiveLSTM(self.model, task.features, task.dim, width, task.dropout)

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Mean weights by how many days ago, over test samples; of self-attention by layer."""
        model(batch["inputs"])
        parts = [m.shown for m in model.modules() if isinstance(m, Block | AttentiveLSTM) and m.shown is not None]
        columns = [str(i) for i in reversed(range(batch["inputs"].shape[1]))]
        rows = [str(i) for i in range(len(parts))]
        values = [part.float().mean(0).tolist() for part in parts]
        return (Picture("attention of the last day", rows, columns, values, ("layers", "days ago")),)
