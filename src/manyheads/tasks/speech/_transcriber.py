# SPDX-License-Identifier: Apache-2.0
"""Transformers that read features of speech and write a short row of words: from the left, in any order, or by CTC."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._whisper import WIDTH

__all__ = ["END", "HIDDEN", "ROOM", "Stacked", "Transcriber"]

ROOM = 6  # words of a transcript, with the end
END, HIDDEN = 10, 11  # after the ten digits; the second begins a row and hides words. 10 is CTC's blank too


class Stacked(nn.Module):
    """Four frames side by side, projected: ``[B, T, 384]`` -> ``[B, T / 4, dim]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(WIDTH), nn.Linear(4 * WIDTH, dim)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.project(self.norm(features).unflatten(1, (-1, 4)).flatten(2))
        return found


class Transcriber(nn.Module):
    """Features ``[B, T, 384]`` and words ``[B, 6]`` -> logits ``[B, 6, 11]``; of CTC, ``[B, T / 4, 11]``.

    Attributes:
        size, frames: features of a frame, and frames of a recording.
        front: features -> ``[B, N, dim]``; a paper may put its own here.
        order: ``left`` (a word sees those before it), ``any`` (all), ``ctc`` (there are none).
        room, ends: words of a row, and the one that ends it.
    """

    def __init__(self, task: Any, width: int, order: str) -> None:
        super().__init__()
        dim, self.size, self.frames, self.order = task.dim, WIDTH, task.frames, order
        self.room, self.ends = ROOM, END
        self.front: nn.Module = Stacked(dim)
        self.places = nn.Parameter(0.02 * torch.randn(task.frames // 4 + ROOM, dim))
        self.words = nn.Embedding(HIDDEN + 1, dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, task.heads, width, task.dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(task.layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, END + 1)

    def forward(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        x = self.front(features)
        heard, mask = x.shape[1], None
        x = x + self.places[ROOM : ROOM + heard]
        if words is not None:
            x = torch.cat((x, self.words(words) + self.places[:ROOM]), 1)
            at = torch.arange(x.shape[1], device=x.device)
            if self.order == "left":  # what was heard sees itself, words see it and those before them
                mask = (at >= heard) & (at > at[:, None])
        for block in self.blocks:
            x = block(x, mask)
        found: Tensor = self.head(self.norm(x if words is None else x[:, heard:]))
        return found

    @staticmethod
    def texts(words: Tensor) -> list[str]:
        """Transcripts of rows ``[B, 6]``, each up to its first end."""
        found = []
        for row in words.tolist():
            upto = next((i for i, word in enumerate(row) if word >= END), len(row))
            found.append(" ".join(map(str, row[:upto])))
        return found
