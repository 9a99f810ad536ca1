# SPDX-License-Identifier: Apache-2.0
"""Strings of spoken digits written down by an attention decoder, one after the other: word error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Sample
from .._blocks import Transformer
from ._digits import WER, DigitStringData, Transcript, word_errors
from ._encoder import SpeechEncoder, TokenDecoder

__all__ = ["DigitDictation", "EncoderDecoder"]

_CLASSES = 11  # the end, which is the beginning too, and ten digits
_DOUBT = 1e-4  # probability of what was not expected
_LONGEST = 32  # digits of a string


class EncoderDecoder(nn.Module):
    """A Transformer that reads frames and writes digits.

    Args:
        encoder, decoder: layers.
        dim, heads, width, dropout: of each.
    """

    def __init__(self, encoder: int, decoder: int, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        blocks = [Transformer(dim, heads, width, dropout) for _ in range(encoder)]
        self.encoder = SpeechEncoder(blocks, dim, 1, dropout, positions=True)
        self.encoder.head = nn.Identity()  # type: ignore[assignment]
        self.decoder = TokenDecoder(_CLASSES, _LONGEST + 1, decoder, dim, heads, width, dropout)
        self.head = nn.Linear(dim, _CLASSES)

    def forward(self, x: Tensor, mask: Tensor, before: Tensor) -> Tensor:
        """Logits ``[B, n + 1, 11]`` behind the beginning and each of ``before`` ``[B, n]``, given encoded frames."""
        logits: Tensor = self.head(self.decoder(x, mask, before))
        return logits


@dataclass(frozen=True, kw_only=True)
class DigitDictation(DigitStringData):
    """The strings of :class:`.digit_strings.DigitStrings`, learned by cross-entropy of the next digit.

    The reference has as many layers in the decoder as in the encoder, ``layers`` in each.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (*WER, Metric("nll", "held-out loss, nats/symbol", "nats/symbol"))
    references: ClassVar[tuple[str, ...]] = ("balanced",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits > _LONGEST:
            raise UserError(f"a string has {_LONGEST} digits at most")

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """The reference with these blocks in its encoder."""
        model = self.encoder_decoder(self.layers, self.layers, 2 * self.dim)
        model.encoder.blocks = nn.ModuleList(blocks)
        return model

    def encoder_decoder(self, encoder: int, decoder: int, width: int) -> EncoderDecoder:
        """A model of so many layers."""
        return EncoderDecoder(encoder, decoder, self.dim, self.heads, width, self.dropout)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return self.encoder_decoder(self.layers, self.layers, width)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        made: Any = model
        x, mask = made.encoder.encode(batch["inputs"], batch["mask"])
        logits = made(x, mask, batch["targets"])
        there = torch.arange(logits.shape[1], device=x.device) <= batch["counts"][:, None]
        wanted = pad(batch["targets"], (0, 1)).masked_fill(~there, -100)
        return cross_entropy(logits.float().flatten(0, 1), wanted.flatten())

    def predict(self, model: nn.Module, batch: Batch) -> list[Transcript]:
        made: Any = model
        x, mask = made.encoder.encode(batch["inputs"], batch["mask"])
        said = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
        while said.shape[1] < min(2 * self.digits, _LONGEST) and not bool((said == 0).any(1).all()):
            said = torch.cat((said, made(x, mask, said)[:, -1:].argmax(-1)), 1)
        rows = [row[: row.index(0)] if 0 in row else row for row in said.tolist()]
        texts = [" ".join(str(k - 1) for k in row) for row in rows]
        if "targets" not in batch:
            return [Transcript(text) for text in texts]
        sure = made(x, mask, batch["targets"]).float().log_softmax(-1).cpu()
        return [
            Transcript(text, each[: count + 1])
            for text, each, count in zip(texts, sure, batch["counts"].tolist(), strict=True)
        ]

    def score(self, sample: Sample, said: Transcript) -> Mapping[str, float]:
        wanted = _symbols(sample.target)
        nll = -float(said.log_probs[range(len(wanted)), wanted].double().mean())
        return {**word_errors(sample.target, said.text), "nll": nll}

    def truth(self, sample: Sample) -> Transcript:
        sure = torch.eye(_CLASSES).clamp(min=_DOUBT)[_symbols(sample.target)]
        return Transcript(sample.target, sure.log().log_softmax(-1))


def _symbols(text: str) -> list[int]:
    """Digits as numbers from 1, and the end."""
    return [*(int(digit) + 1 for digit in text.split()), 0]
