# SPDX-License-Identifier: Apache-2.0
"""The encoder that speech tasks share: log-mel frames, a fourfold subsampling, blocks, and a layer to the classes.

A reference block is of transformers: a Conformer's (Parakeet's, with relative positions). Padding never reaches what
stands beside it: it is zeroed before each convolution.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.masks import zero_padding
from ...attention.positions import interleaved_sinusoids

__all__ = ["MELS", "RATE", "Conformer", "SpeechEncoder", "TokenDecoder", "log_mel", "mel_filters"]

RATE = 8000  # samples a second that every recording is brought to
MELS = 40
_WINDOW, _HOP, _FFT = 200, 80, 256  # 25 ms every 10 ms
_FLOOR = 1e-3  # of the energy in a filter; what is quieter is silence


@cache
def mel_filters(scale: str = "slaney", norm: str | None = "slaney") -> Tensor:
    """Triangles ``[129, 40]`` on bins of a spectrum of 256 samples at 8 kHz."""
    from transformers.audio_utils import mel_filter_bank

    return torch.from_numpy(mel_filter_bank(_FFT // 2 + 1, MELS, 0.0, RATE / 2, RATE, norm, scale)).float()


def log_mel(sound: Tensor) -> Tensor:
    """Log energies of mel filters, mean 0 and variance 1 in each filter: float32 ``[N]`` at 8 kHz -> ``[T, 40]``."""
    room = max(_FFT, len(sound))
    padded = nn.functional.pad(sound, (0, room - len(sound)))
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(padded, _FFT, _HOP, _WINDOW, window, return_complex=True).abs().square()
    energies = (spectrum.T @ mel_filters()).clamp(min=_FLOOR).log()
    return (energies - energies.mean(0)) / energies.std(0).clamp(min=1e-3)


class SpeechEncoder(nn.Module):
    """Frames ``[B, T, 40]`` and mask ``[B, T]`` -> logits ``[B, T / 4, classes]`` and their mask, True where speech is.

    Args:
        blocks: each ``block(x [B, T / 4, dim], mask) -> [B, T / 4, dim]``.
        dim: features.
        classes: of the last layer.
        dropout: behind the subsampling.
        positions: add sinusoidal ones, for blocks that have none of their own.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], dim: int, classes: int, dropout: float = 0.0, positions: bool = False
    ) -> None:
        super().__init__()
        channels, self.positions = max(8, dim // 4), positions
        self.first = nn.Conv2d(1, channels, 3, 2, 1)
        self.second = nn.Conv2d(channels, channels, 3, 2, 1)
        self.project = nn.Linear(channels * math.ceil(MELS / 4), dim)
        self.dropout, self.blocks = nn.Dropout(dropout), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and mask."""
        x, mask = self.encode(frames, mask)
        return self.head(x), mask

    def encode(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, T / 4, dim]`` and mask."""
        x, mask = self.front(frames, mask)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask

    def front(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block is given, ``[B, T / 4, dim]``, and mask."""
        x = zero_padding(frames, mask)[:, None]
        for convolution in (self.first, self.second):
            mask = mask[:, ::2]
            x = convolution(x).relu() * mask[:, None, :, None]
        x = self.project(x.transpose(1, 2).flatten(2))
        if self.positions:
            x = x + interleaved_sinusoids(torch.arange(x.shape[1], device=x.device), x.shape[2])
        return self.dropout(x), mask


class TokenDecoder(nn.Module):
    """States ``[B, n + 1, dim]`` behind the beginning and each of n symbols, which attend to frames.

    Args:
        symbols, places: how many there are; symbol 0 is the beginning.
        layers: of it.
        dim, heads, width, dropout: of each.
    """

    def __init__(
        self, symbols: int, places: int, layers: int, dim: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, dim), nn.Embedding(places, dim)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, heads, width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor, before: Tensor) -> Tensor:
        """Of frames ``[B, T, dim]``, where speech is ``[B, T]``, and symbols from the left ``[B, n]``."""
        size = before.shape[1] + 1
        y = self.symbols(nn.functional.pad(before, (1, 0))) + self.places.weight[:size]
        later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers:
            y = layer(y, x, tgt_mask=later, memory_key_padding_mask=~mask)
        states: Tensor = self.norm(y)
        return states


class Conformer(nn.Module):
    """A Conformer's block of transformers, with relative positions."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float, kernel: int = 31) -> None:
        super().__init__()
        from transformers import ParakeetEncoderConfig
        from transformers.models.parakeet import modeling_parakeet as parakeet

        kind: Any = ParakeetEncoderConfig
        config = kind(
            hidden_size=dim, num_attention_heads=heads, intermediate_size=width, conv_kernel_size=kernel,
            dropout=dropout, activation_dropout=dropout, attention_dropout=dropout, attn_implementation="eager",
        )  # fmt: skip
        self.block = parakeet.ParakeetEncoderBlock(config, 0)
        self.positions = parakeet.ParakeetEncoderRelPositionalEncoding(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, dim]``."""
        both = mask[:, None, None, :] & mask[:, None, :, None]
        found: Tensor = self.block(x, attention_mask=both, position_embeddings=self.positions(x))
        return found
