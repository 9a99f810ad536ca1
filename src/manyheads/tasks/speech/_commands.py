# SPDX-License-Identifier: Apache-2.0
"""Spoken commands of digits: their grammar, which of them are labelled, transcripts, and Whisper's features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from ...data.digits import DIGITS
from ...recipe import Sample
from .._embedded import embedded_texts
from ._digits import fixed_strings

__all__ = ["FRAMES", "MELS", "SIZES", "SLOTS", "Command", "command", "labelled", "sentences", "whisper_mel"]

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
def labelled(samples: tuple[Sample, ...], commands: int, words: int) -> list[Sample]:
    """Commands that have a meaning."""
    speakers = sorted({sample.group for sample in samples})
    own = set(speakers[: max(1, len(speakers) // 2)])
    found = fixed_strings([sample for sample in samples if sample.group in own], "train", words)
    return [command(sample) for sample in found[:commands]]


def command(sample: Sample) -> Sample:
    """A string of three digits by what it means."""
    spoken = " ".join(DIGITS[int(digit)] for digit in sample.target.split())
    return replace(sample, target=Command.of(sample.target).values, about={"spoken": spoken})


@cache
def sentences() -> dict[str, Tensor]:
    """Vectors of all wordings of commands, by MiniLM."""
    from ...models import load_reader

    model, tokenizer = load_reader("all-minilm-l6-v2", "cpu", torch.float32)
    texts = [*DIGITS, *(f"{a} {b} {c}" for a in DIGITS for b in DIGITS for c in DIGITS)]
    return dict(zip(texts, embedded_texts(model, tokenizer, texts, at_once=len(texts)), strict=True))
