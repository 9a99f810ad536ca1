# SPDX-License-Identifier: Apache-2.0
"""Spoken commands, few of them labelled, understood without a transcript: action, object and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.masks import zero_padding
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from ._commands import FRAMES, MELS, SIZES, SLOTS, Command, CommandData
from ._ctc import ctc_mean
from ._encoder import TokenDecoder
from ._understanding import StandingEncoder, UnderstandingTask, confusion, take
from ._whisper import states

__all__ = ["CommandModel", "SpokenCommands", "WhisperStates"]

_OFFSETS = tuple(sum(SIZES[:i]) for i in range(len(SIZES)))


class WhisperStates(StandingEncoder):
    """Whisper's encoder, which takes recordings of any length up to 30 s: padding does not reach what was spoken."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper import modeling_whisper as whisper

        kind: Any = WhisperConfig
        config = kind(
            d_model=dim, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * dim, dropout=dropout,
            max_source_positions=FRAMES, num_mel_bins=MELS, attn_implementation="sdpa",
        )  # fmt: skip
        self.inside = whisper.WhisperEncoder(config)

    def states(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``[B, T, 80]`` -> ``[B, T / 2, dim]``."""
        return states(self.inside, zero_padding(inputs, mask).mT, mask), mask[:, ::2]


class CommandModel(nn.Module):
    """Encoder, and a decoder of one layer that attends to it and says one slot after the other.

    Args:
        encoder: its states are attended to.
        dim, heads, width, dropout: of the decoder's layer.
    """

    def __init__(self, encoder: StandingEncoder, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = TokenDecoder(1 + sum(SIZES), len(SIZES), 1, dim, heads, width, dropout)
        self.head: nn.Module = nn.Linear(dim, sum(SIZES))

    def decode(self, x: Tensor, mask: Tensor, before: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits ``[B, n + 1, values]`` of the slots behind ``before`` ``[B, n]``; -inf for values of other slots."""
        states = self.decoder(x, mask, before + 1)
        logits: Tensor = self.head(states) if text is None else self.head(states, text)
        slot = torch.arange(len(SIZES), device=x.device).repeat_interleave(torch.tensor(SIZES, device=x.device))
        return logits.masked_fill(slot != torch.arange(states.shape[1], device=x.device)[:, None], float("-inf"))


@dataclass(frozen=True, kw_only=True)
class SpokenCommands(CommandData, UnderstandingTask):
    """Three digits of the Free Spoken Digit Dataset, spoken by one person, are a command, by a grammar of ours.

    No free recordings of spoken requests are published; commands are put together from real single words, and their
    meaning is ours: the first digit modulo 4 is the action, the second modulo 2 the object, the third modulo 5 the
    place, so that there are 40 commands and 1,000 wordings. Of a single word all three follow: ten commands. Those that
    are labelled are of the first half of the speakers that are trained on; every recording of all of these speakers has
    a transcript. Validation and test have a speaker each. The encoder has the shape of Whisper's, and its features.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("intent", "commands of which all three slots are right", higher=True, kind="share"),
        Metric("slots", "share of slots that are right", higher=True, kind="share"),
    )
    references: ClassVar[tuple[str, ...]] = ("command_decoder",)
    encoder: ClassVar[str] = "whisper-tiny.en"

    def transcription_loss(self, encoder: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
        """Mean CTC loss a digit or letter of a batch of :meth:`transcribed`."""
        x, mask = encoder(batch["inputs"], batch["mask"])
        return ctc_mean(head(x), mask, batch["targets"], batch["counts"])

    def reference(self, width: int, kind: str = "") -> nn.Module:
        encoder = WhisperStates(self.dim, self.layers, self.heads, self.dropout)
        return CommandModel(encoder, self.dim, self.heads, width, self.dropout)

    def load_published(self, model: Any) -> None:
        from ...models import load_speech

        found: Any = load_speech(self.encoder, "cpu", torch.float32)[0].get_encoder()
        has = {"dim": found.config.d_model, "heads": found.config.encoder_attention_heads, "layers": len(found.layers)}
        take(model.encoder.inside, found, self.encoder, self.shape(), has)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        made: Any = model
        x, mask = made.encoder(batch["inputs"], batch["mask"])
        targets = batch["targets"] + torch.tensor(_OFFSETS, device=x.device)
        logits = made.decode(x, mask, targets[:, :-1], batch.get("text"))
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def predict(self, model: nn.Module, batch: Batch) -> list[Command]:
        made: Any = model
        x, mask = made.encoder(batch["inputs"], batch["mask"])
        said = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
        for _ in SIZES:
            said = torch.cat((said, made.decode(x, mask, said)[:, -1:].argmax(-1)), 1)
        return [Command(tuple(row)) for row in (said.cpu() - torch.tensor(_OFFSETS)).tolist()]

    def score(self, sample: Sample, said: Command) -> Mapping[str, float]:
        right = [a == b for a, b in zip(sample.target, said.values, strict=True)]
        return {"intent": float(all(right)), "slots": sum(right) / len(right)}

    def truth(self, sample: Sample) -> Command:
        return Command(sample.target)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Command]) -> Sequence[Picture]:
        both = [(sample.target, one.values) for sample, one in zip(samples, said, strict=True)]
        slots = enumerate(SLOTS.items())
        return [confusion(name, values, [(a[i], b[i]) for a, b in both]) for i, (name, values) in slots]
