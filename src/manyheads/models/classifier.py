# SPDX-License-Identifier: Apache-2.0
"""An encoder that names the class of a whole sequence: of bytes, of a waveform, of a time series.

    stem        makes tokens of the input: an embedding of bytes, a convolution over a waveform, or patches of a series
    blocks      those of an :class:`~manyheads.models.encoder.Encoder`, around any token mixer that sees both sides
    head        the mean over the tokens, and a linear layer to the classes

The stem's tokens are brought to size 1 and get sinusoidal positions with a learned factor, alike under every mixer:
some mixers have no positions of their own.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..attention.masks import zero_padding
from ..errors import UserError
from .decoder import DecoderConfig, TokenModel

__all__ = ["Classifier", "ClassifierConfig", "StemKind"]

StemKind = Literal["embedding", "conv", "patches"]
_BASE = 10_000.0  # longest wavelength of positions, over 2 pi


@dataclass(frozen=True, slots=True)
class ClassifierConfig(DecoderConfig):
    """Size of a classifier; of a :class:`DecoderConfig`, ``vocab`` counts for an embedding and ``length`` tokens.

    Attributes:
        classes: that there are.
        stem: ``embedding`` of ids ``[B, T]``; of values ``[B, T, channels]``, ``conv`` or ``patches``.
        channels: of a value.
        stride: values of a token; a convolution reads four times as many.
    """

    classes: int = 2
    stem: StemKind = "embedding"
    channels: int = 1
    stride: int = 1


class Stem(nn.Module):
    """Tokens ``[B, ceil(T / stride), dim]`` of ids ``[B, T]``, or of values ``[B, T, channels]``."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        dim, wide, self.config = config.dim, 4 * config.stride, config
        self.norm, self.position = nn.RMSNorm(dim, eps=1e-6), nn.Parameter(torch.tensor(0.5))
        if config.stem == "embedding":
            if config.stride != 1:
                raise UserError("every byte is a token of an embedding: stride is for conv and patches")
            self.make: nn.Module = nn.Embedding(config.vocab, dim)
        elif config.stem == "conv":
            self.make = nn.Conv1d(config.channels, dim, wide, config.stride, bias=False)
            self.smooth = nn.Conv1d(dim, dim, 3, padding=1)
        else:
            self.make = nn.Conv1d(config.channels, dim, config.stride, config.stride)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Padding by ``mask`` of tokens."""
        if self.config.stem == "embedding":
            x = self.make(values)
        else:
            more = 3 * self.config.stride if self.config.stem == "conv" else 0  # on both sides in all
            short = -values.shape[1] % self.config.stride
            rows = nn.functional.pad(values.mT, (more // 2, more - more // 2 + short))
            x = self.make(rows).mT
        if self.config.stem == "conv":
            x = self.smooth(zero_padding(nn.functional.gelu(x), mask).mT).mT
        at = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        rate = _BASE ** (-torch.arange(0, x.shape[2], 2, device=x.device, dtype=torch.float32) / x.shape[2])
        angles = at[:, None] * rate
        positions = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, : x.shape[2]]
        y: Tensor = self.norm(x) + self.position * math.sqrt(2) * positions.to(self.position.dtype)
        return y


class Classifier(TokenModel):
    """Stem, blocks with the mixer of ``strategy``, and logits over the classes."""

    causal: ClassVar[bool] = False
    config_type: ClassVar[type[DecoderConfig]] = ClassifierConfig

    def _stem(self) -> nn.Module:
        config = cast(ClassifierConfig, self.config)
        self.head = nn.Linear(config.dim, config.classes)
        return Stem(config)

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, **refused: Any) -> tuple[Tensor, list[Any]]:
        """Logits ``[B, classes]`` of ids ``[B, T]`` or values ``[B, T, channels]``, and None for every layer.

        Args:
            ids: whole sequences.
            mask: ``[B, T]``, True for what is no padding, from column 0 on; a token counts if any of its values does.
            refused: a classifier takes no state and no packed sequences.
        """
        if any(value is not None for value in refused.values()):
            raise UserError(f"a classifier reads whole sequences, padded by a mask: no {', '.join(refused)}")
        if mask is not None:
            stride = cast(ClassifierConfig, self.config).stride
            ids = ids.masked_fill(~mask if ids.ndim == 2 else ~mask[..., None], 0)
            mask = nn.functional.pad(mask, (0, -mask.shape[1] % stride)).unflatten(1, (-1, stride)).any(2)
        x, weights = self.embed(ids, mask), None if mask is None else mask.float()
        after: list[Any] = [None] * len(self.blocks)
        if self.merges:
            x, weights, _ = self.merged(zero_padding(x, mask), None if mask is None else mask.sum(1))
        else:
            x, after = self.mixed(zero_padding(x, mask), mask=mask)
        x = self.norm(x)
        pooled = x.mean(1) if weights is None else (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return self.head(pooled), after
