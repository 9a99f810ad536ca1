# SPDX-License-Identifier: Apache-2.0
"""Spoken commands, few of them labelled, understood without a transcript: action, object and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...attention.masks import padded, zero_padding
from ...data.digits import DIGITS
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Part, Picture, Sample
from .._embedded import embedded_texts
from ._ctc import ctc_mean
from ._digits import SpokenDigits, drawn_strings, fixed_strings, paced
from ._encoder import TokenDecoder
from ._understanding import StandingEncoder, UnderstandingTask, confusion, take
from ._whisper import states

__all__ = ["SLOTS", "Command", "CommandModel", "SpokenCommands", "WhisperStates", "whisper_mel"]

SLOTS = {
    "action": ("activate", "deactivate", "increase", "decrease"), "object": ("lights", "heat"),
    "place": ("everywhere", "kitchen", "bedroom", "washroom", "hall"),
}  # fmt: skip
_SIZES = tuple(map(len, SLOTS.values()))
_MELS, _WINDOW, _HOP, _LOUD = 80, 200, 80, 0.1  # Whisper's frames at 8 kHz; its recordings are about so loud
_FRAMES = 1500  # positions that Whisper has, of 20 ms


@dataclass(frozen=True)
class Command:
    """What is meant: a number of each slot's values."""

    values: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(names[k] for names, k in zip(SLOTS.values(), self.values, strict=True))

    @classmethod
    def of(cls, digits: str) -> Command:
        """The grammar: what three digits mean, or one, which is as if it were said three times."""
        spoken = digits.split() * (3 if len(digits.split()) == 1 else 1)
        return cls(tuple(int(d) % size for d, size in zip(spoken, _SIZES, strict=True)))


@cache
def _filters() -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    found = mel_filter_bank(_WINDOW + 1, _MELS, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(found[: _WINDOW // 2 + 1]).float()  # of 40 Hz each; above 4 kHz there is nothing


def whisper_mel(sound: Tensor) -> Tensor:
    """Whisper's features of a recording at 8 kHz: float32 ``[N]`` -> ``[T, 80]`` every 10 ms.

    Its windows of 25 ms have 400 samples at 16 kHz and 200 at 8 kHz: bins are of 40 Hz in both, with half the sum.
    """
    padded = nn.functional.pad(_LOUD * sound, (0, max(0, _WINDOW - len(sound))))
    spectrum = torch.stft(padded, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), return_complex=True)[:, :-1]
    logs = (4 * spectrum.abs().square().T @ _filters()).clamp(min=1e-10).log10()
    return (logs.clamp(min=float(logs.max()) - 8) + 4) / 4


@lru_cache(maxsize=4)
def _labelled(samples: tuple[Sample, ...], commands: int, words: int) -> list[Sample]:
    """Commands that have a meaning."""
    speakers = sorted({sample.group for sample in samples})
    own = set(speakers[: max(1, len(speakers) // 2)])
    found = fixed_strings([sample for sample in samples if sample.group in own], "train", words)
    return [_command(sample) for sample in found[:commands]]


def _command(sample: Sample) -> Sample:
    """A string of three digits by what it means."""
    spoken = " ".join(DIGITS[int(digit)] for digit in sample.target.split())
    return replace(sample, target=Command.of(sample.target).values, about={"spoken": spoken})


@cache
def _sentences() -> dict[str, Tensor]:
    """Vectors of all wordings of commands, by MiniLM."""
    from ...models import load_reader

    model, tokenizer = load_reader("all-minilm-l6-v2", "cpu", torch.float32)
    texts = [*DIGITS, *(f"{a} {b} {c}" for a in DIGITS for b in DIGITS for c in DIGITS)]
    return dict(zip(texts, embedded_texts(model, tokenizer, texts, at_once=len(texts)), strict=True))


_OFFSETS = tuple(sum(_SIZES[:i]) for i in range(len(_SIZES)))


class WhisperStates(StandingEncoder):
    """Whisper's encoder, which takes recordings of any length up to 30 s: padding does not reach what was spoken."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper import modeling_whisper as whisper

        kind: Any = WhisperConfig
        config = kind(
            d_model=dim, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * dim, dropout=dropout,
            max_source_positions=_FRAMES, num_mel_bins=_MELS, attn_implementation="sdpa",
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
        self.decoder = TokenDecoder(1 + sum(_SIZES), len(_SIZES), 1, dim, heads, width, dropout)
        self.head: nn.Module = nn.Linear(dim, sum(_SIZES))

    def decode(self, x: Tensor, mask: Tensor, before: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits ``[B, n + 1, values]`` of the slots behind ``before`` ``[B, n]``; -inf for values of other slots."""
        states = self.decoder(x, mask, before + 1)
        logits: Tensor = self.head(states) if text is None else self.head(states, text)
        slot = torch.arange(len(_SIZES), device=x.device).repeat_interleave(torch.tensor(_SIZES, device=x.device))
        return logits.masked_fill(slot != torch.arange(states.shape[1], device=x.device)[:, None], float("-inf"))


@dataclass(frozen=True, kw_only=True)
class SpokenCommands(SpokenDigits, UnderstandingTask):
    """Three digits of the Free Spoken Digit Dataset, spoken by one person, are a command, by a grammar of ours.

    No free recordings of spoken requests are published; commands are put together from real single words, and their
    meaning is ours: the first digit modulo 4 is the action, the second modulo 2 the object, the third modulo 5 the
    place, so that there are 40 commands and 1,000 wordings. Of a single word all three follow: ten commands. Those that
    are labelled are of the first half of the speakers that are trained on; every recording of all of these speakers has
    a transcript. Validation and test have a speaker each. The encoder has the shape of Whisper's, and its features.

    Attributes:
        words: of a command, 3 or 1.
        commands: that are labelled; the same for all arms and trainings.
        stretch: how much faster or slower a command, or a word to transcribe, may be read in training, as a share.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("intent", "commands of which all three slots are right", higher=True, kind="share"),
        Metric("slots", "share of slots that are right", higher=True, kind="share"),
    )
    references: ClassVar[tuple[str, ...]] = ("command_decoder",)
    encoder: ClassVar[str] = "whisper-tiny.en"
    text: ClassVar[int] = 384  # features of a text, see :meth:`described`

    layers: int = 3
    words: int = 3
    commands: int = 100
    stretch: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words not in (1, 3) or self.commands < 1 or not 0 <= self.stretch < 1:
            raise UserError("words is 1 or 3, commands count, 1 or more, and stretch is a share below 1")

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        drawn = super().draw(rng, _labelled(tuple(samples), self.commands, self.words))
        return [replace(sample, inputs=paced(rng, sample.inputs, self.stretch)) for sample in drawn]

    def judged(self, part: Part) -> Sequence[Sample]:
        return [_command(s) for s in fixed_strings(self.samples(part), part, self.words)][: self.samples_judged]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        inputs, mask = padded([whisper_mel(sample.inputs) for sample in samples])
        if any(sample.target is None for sample in samples):
            return {"inputs": inputs, "mask": mask}
        return {"inputs": inputs, "mask": mask, "targets": torch.tensor([sample.target for sample in samples])}

    def transcribed(self, rng: np.random.Generator, samples: Sequence[Sample], letters: bool = False) -> Batch:
        """A batch of strings of as many words as a command at most: ``targets`` from 1 on, and ``counts`` of them.

        ``letters`` are of a language of its own: of no speaker of the labelled commands, if there are others.
        """
        if letters:
            speakers = sorted({sample.group for sample in samples})
            others = set(speakers[max(1, len(speakers) // 2) :]) or set(speakers)
            samples = [sample for sample in samples if sample.group in others]
        drawn = drawn_strings(rng, samples, self.batch, self.words, self.stretch)
        texts = [[int(digit) for digit in sample.target.split()] for sample in drawn]
        if letters:
            coded = [[ord(letter) - ord("a") + 1 for digit in text for letter in DIGITS[digit]] for text in texts]
        else:
            coded = [[digit + 1 for digit in text] for text in texts]
        targets, there = padded([torch.tensor(one) for one in coded])
        made = self.collate([replace(sample, target=None) for sample in drawn])
        return {**made, "targets": targets, "counts": there.sum(1)}

    def described(self, samples: Sequence[Sample]) -> Tensor:
        """Sentence vectors ``[B, 384]`` of what is spoken, by MiniLM, which learns nothing here.

        Raises:
            UserError: MiniLM cannot be had.
        """
        return torch.stack([_sentences()[sample.about["spoken"]] for sample in samples])

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
        for _ in _SIZES:
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
