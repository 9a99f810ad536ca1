# SPDX-License-Identifier: Apache-2.0
"""Spoken commands of digits: their grammar, which of them are labelled, transcripts, and Whisper's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.masks import padded
from ...data.digits import DIGITS
from ...errors import UserError
from ...recipe import Batch, Part, Sample
from .._embedded import embedded_texts
from ._digits import SpokenDigits, drawn_strings, fixed_strings, paced

__all__ = ["FRAMES", "MELS", "SIZES", "SLOTS", "Command", "CommandData", "whisper_mel"]

SLOTS = {
    "action": ("activate", "deactivate", "increase", "decrease"), "object": ("lights", "heat"),
    "place": ("everywhere", "kitchen", "bedroom", "washroom", "hall"),
}  # fmt: skip
SIZES = tuple(map(len, SLOTS.values()))
MELS, _WINDOW, _HOP, _LOUD = 80, 200, 80, 0.1  # Whisper's frames at 8 kHz; its recordings are about so loud
FRAMES = 1500  # positions that Whisper has, of 20 ms


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
        return cls(tuple(int(d) % size for d, size in zip(spoken, SIZES, strict=True)))


@cache
def _filters() -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    found = mel_filter_bank(_WINDOW + 1, MELS, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
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


@dataclass(frozen=True, kw_only=True)
class CommandData(SpokenDigits):
    """Commands, their features and their transcripts; see :class:`.spoken_commands.SpokenCommands`.

    Attributes:
        words: of a command, 3 or 1.
        commands: that are labelled; the same for all arms and trainings.
        stretch: how much faster or slower a command, or a word to transcribe, may be read in training, as a share.
    """

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
