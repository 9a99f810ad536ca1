# SPDX-License-Identifier: Apache-2.0
"""What is said of frames, and the model around a fusion of two streams of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ._cepstra import COEFFICIENTS
from ._encoder import RATE
from ._mixtures import FRAME

__all__ = ["SECONDS", "Activity", "OneStream", "VadModel"]

SECONDS = FRAME / RATE  # of a frame


@dataclass(frozen=True, eq=False)
class Activity:
    """What is said of a recording.

    Attributes:
        speech: probability of speech by frame of 20 ms, ``[T]``.
    """

    speech: Tensor

    def __str__(self) -> str:
        said = [0, *(self.speech >= 0.5).int().tolist(), 0]
        at = [i for i, (one, other) in enumerate(pairwise(said)) if one != other]
        return ", ".join(f"{a * SECONDS:.2f}-{b * SECONDS:.2f}" for a, b in zip(at[::2], at[1::2], strict=True))


class VadModel(nn.Module):
    """Two streams of frames, MFCC and Whisper's, each brought to ``dim``, fused, and read by a bidirectional LSTM.

    Args:
        fusion: ``fusion(mfcc [B, T, dim], whisper [B, T, dim], mask [B, T]) -> [B, T, size]``.
        size: of what it gives.
        dim: of layers.
        states: of Whisper.
        hidden: of each direction of the LSTM.
        layers: of it.
        dropout: between layers.
    """

    def __init__(
        self, fusion: nn.Module, size: int, dim: int, states: int, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.mfcc, self.whisper = nn.Linear(COEFFICIENTS, dim), nn.Linear(states, dim)
        self.fusion, drop = fusion, nn.Dropout(dropout)
        self.before = nn.Sequential(nn.Linear(size, dim), nn.GELU(), drop, nn.Linear(dim, dim), nn.GELU())
        self.recurrent = nn.LSTM(
            dim, hidden, layers, batch_first=True, bidirectional=True, dropout=dropout * (layers > 1)
        )
        self.after = nn.Sequential(nn.Linear(2 * hidden, dim), nn.GELU(), drop, nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Linear(dim, 1)

    def forward(self, cepstra: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Logits of speech ``[B, T]``."""
        x = self.before(self.fusion(self.mfcc(cepstra), self.whisper(states), mask))
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=x.shape[1])
        logits: Tensor = self.head(self.after(x))[..., 0]
        return logits


class OneStream(nn.Module):
    """One of two streams alone."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, mfcc: Tensor, whisper: Tensor, mask: Tensor) -> Tensor:
        return (mfcc, whisper)[self.which]
