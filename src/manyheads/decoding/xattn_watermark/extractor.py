# SPDX-License-Identifier: Apache-2.0
"""The reader of the message: a bidirectional transformer over the tokens of a text, of which each bit has a query.

Each query attends to the places of the text, and what it finds there is projected to one number, its evidence.

It needs neither the model nor the prompt. What it knows of a token is a row of a table, the model's own embeddings
in their main directions, whitened; the table stays as it is and lies beside the weights.

Legend: B batch, T tokens, V vocabulary, R channels of the table, b bits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...calls.trained import load_trained, save_trained
from .embedder import HOW

__all__ = ["Extractor", "token_table"]


def token_table(embeddings: Tensor, channels: int) -> Tensor:
    """Embeddings ``[V, D]`` in their ``channels`` main directions, each of variance 1, float32 ``[V, R]``."""
    x = embeddings.detach().float()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh((x.mT @ x / len(x)).double().cpu())
    keep = min(channels, x.shape[1])
    values, vectors = values[-keep:].clamp(min=1e-12), vectors[:, -keep:]
    table: Tensor = x @ (vectors / values.sqrt()).to(x)
    return table


class Extractor(nn.Module):
    """Reads ``b`` bits.

    Args:
        vocabulary, channels: V and R of the table.
        bits: b.
        dim, heads, layers: of the transformer.
        about: how it was trained, plain values.
    """

    def __init__(
        self, vocabulary: int, channels: int, bits: int, dim: int = 128, heads: int = 4, layers: int = 2,
        about: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = {
            "vocabulary": vocabulary, "channels": channels, "bits": bits, "dim": dim, "heads": heads, "layers": layers,
        }  # fmt: skip
        self.about, self.bits = dict(about or {}), bits
        self.table: Tensor
        self.register_buffer("table", torch.zeros(vocabulary, channels, dtype=torch.float16))
        self.into = nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.tensor(0.1))  # size of the positions' sinusoids
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        nn.init.normal_(self.into.weight, std=channels**-0.5)
        self.queries = nn.Parameter(torch.randn(bits, dim) / math.sqrt(dim))
        self.keys = nn.Linear(dim, dim, bias=False)
        self.answer = nn.Parameter(torch.randn(bits, dim) / math.sqrt(dim))
        # A mean over some sixty tokens is an eighth as large as one of them: at first the reader looks at it already.
        self.scale, self.bias = nn.Parameter(torch.full((bits,), 4.0)), nn.Parameter(torch.zeros(bits))

    def embedded(self, text: Tensor) -> Tensor:
        """What is known of tokens, ``[B, T, R]``: of int64 ``[B, T]``, or of weights over all of them ``[B, T, V]``."""
        table = self.table.to(self.queries.dtype)
        return table[text] if text.dtype == torch.int64 else text.to(table) @ table

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Log odds of a 1 for each bit, ``[B, b]``, of ``x [B, T, R]`` where ``real [B, T]`` is true."""
        x = self.into(x)
        x = x + self.place * _sinusoids(x)
        padded = torch.zeros(real.shape, device=x.device, dtype=x.dtype).masked_fill(~real, -torch.inf)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padded)
        weights = (self.keys(x) @ self.queries.mT + padded[..., None]).softmax(1)  # [B, T, b], of each bit's query
        found: Tensor = self.scale * (weights * (x @ self.answer.mT)).sum(1) + self.bias
        return found

    def save(self, folder: str | Path) -> Path:
        """Write weights, table and settings into ``folder``, which ``xattn_watermark:weights=`` takes."""
        return save_trained(folder, "extractor", self.state_dict(), {**self.config, "about": self.about})

    @staticmethod
    def load(folder: str | Path) -> Extractor:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder does not hold an extractor.
        """
        return load_trained(folder, "extractor", lambda config: Extractor(**config), "extractor", HOW)


def _sinusoids(x: Tensor) -> Tensor:
    """Of the positions of ``x [B, T, dim]``, ``[T, dim]``."""
    half = x.shape[-1] // 2
    rate = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000.0) / half))
    angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)
