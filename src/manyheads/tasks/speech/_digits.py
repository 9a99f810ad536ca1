# SPDX-License-Identifier: Apache-2.0
"""Bases of tasks on recordings of spoken digits, the public ones or the user's, and strings that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...attention.masks import padded
from ...data.audio import read_recording
from ...data.digits import DIGITS
from ...data.labelled import labelled
from ...errors import UserError
from ...experiment import Metric, seeding
from ...recipe import Batch, Part, Sample
from .._field import FieldTask, parted
from ._encoder import RATE, log_mel

__all__ = [
    "WER", "DigitStringData", "SpokenDigits", "Transcript", "aligned", "at_pace", "by_speaker", "corpus",
    "drawn_strings", "fixed_strings", "paced", "spoken", "word_errors",
]  # fmt: skip

_GAP = 0.1  # seconds of near silence at most, before, between and behind words
_END = 0.25  # chance that a string of a corpus ends behind a word
_NOISE = 0.01  # of the recordings' own deviation: no silence is digital
_LONGEST = 30.0  # seconds of a recording of the user's

WER = (
    Metric(
        "wer", "word error rate", "errors/word", floor=0.8,
        what="wrong, missing and surplus digits by the number of digits spoken (jiwer); guesses have 0.8 to 1",
    ),
    Metric("exact", "strings without an error", higher=True, kind="share"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Transcript:
    """What is recognised.

    Attributes:
        text: digits with a space between.
        log_probs: ``[T, classes]`` of each frame or of each next symbol, as a task says; empty where none are known.
    """

    text: str
    log_probs: Tensor = field(default_factory=lambda: torch.zeros(0, 11))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class SpokenDigits(FieldTask):
    """Single words of the Free Spoken Digit Dataset: four speakers to train on, one that validates, one that tests."""

    files: ClassVar[tuple[str, ...]] = ("fsdd", "free-spoken-digit-dataset")
    takes: ClassVar[str] = "a folder of WAV files named digit_speaker_number.wav, of three speakers or more"

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        if folder is None:
            items = labelled("fsdd").items
            return [Sample(i.name, i.group, i.part, i.values[:, 0], str(i.label)) for i in items]
        named = [(path, path.stem.split("_")) for path in sorted(folder.glob("*.wav"))]
        good = [(path, p[0], p[1]) for path, p in named if len(p) == 3 and p[0] in set("0123456789")]
        if not good:
            raise UserError(f"{folder} holds no recording that can be used; it should be {cls.takes}")
        home = parted([who for _, _, who in good])
        return [Sample(path.stem, who, home[who], _sound(path), digit) for path, digit, who in good]

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", _sound(path))


@dataclass(frozen=True, kw_only=True)
class DigitStringData(SpokenDigits):
    """Strings of recordings of one speaker, put together with short gaps.

    Training draws strings of 1 to ``digits`` words anew at each step, each word read a little faster or slower. What is
    judged are strings of exactly ``digits`` words; every recording of the part is in one of them at most, so that
    strings are independent. A batch has log-mel frames, and digits from 1 on.

    Attributes:
        digits: words of a string.
        stretch: how much faster or slower a word may be read in training, as a share.
    """

    digits: int = 4
    stretch: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits < 1 or not 0 <= self.stretch < 1:
            raise UserError("digits count, 1 or more; stretch is a share below 1")

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        return self.drawn(rng, samples, self.batch)

    def drawn(self, rng: np.random.Generator, samples: Sequence[Sample], count: int) -> Sequence[Sample]:
        """As many strings of one to ``digits`` words."""
        return drawn_strings(rng, samples, count, self.digits, self.stretch)

    def judged(self, part: Part) -> Sequence[Sample]:
        return fixed_strings(self.samples(part), part, self.digits)[: self.samples_judged]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        inputs, mask = padded([log_mel(sample.inputs) for sample in samples])
        if any(sample.target is None for sample in samples):
            return {"inputs": inputs, "mask": mask}
        targets, there = padded([torch.tensor([int(d) + 1 for d in sample.target.split()]) for sample in samples])
        return {"inputs": inputs, "mask": mask, "targets": targets, "counts": there.sum(1)}


@cache
def corpus(strings: int, digits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Durations in s and letters of strings of 1 to ``digits`` words by one speaker each, always the same ones.

    A quarter of them ends behind each word, so that most are short and few are long, as utterances are.
    """
    rng, items = seeding.generator(0, corpus=strings, digits=digits), labelled("fsdd").items
    speakers = sorted({item.group for item in items})
    own = {who: [item for item in items if item.group == who] for who in speakers}
    durations, letters = [], []
    for _ in range(strings):
        mine = own[speakers[int(rng.integers(len(speakers)))]]
        words = [mine[i] for i in rng.integers(0, len(mine), min(digits, int(rng.geometric(_END))))]
        durations.append(sum(len(word.values) for word in words) / RATE)
        letters.append(float(sum(len(DIGITS[word.label]) + 1 for word in words)))
    return tuple(durations), tuple(letters)


def by_speaker(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """In the order in which they come."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.group, []).append(sample)
    return found


def drawn_strings(
    rng: np.random.Generator, samples: Sequence[Sample], count: int, digits: int, stretch: float
) -> list[Sample]:
    """Strings of 1 to ``digits`` words, each word read faster or slower by a share of ``stretch`` at most."""
    made, groups = [], by_speaker(samples)
    for _ in range(count):
        own = groups[samples[int(rng.integers(len(samples)))].group]
        words = [own[i] for i in rng.integers(0, len(own), rng.integers(1, digits + 1))]
        made.append(_string(rng, [replace(word, inputs=paced(rng, word.inputs, stretch)) for word in words], "drawn"))
    return made


def fixed_strings(samples: Sequence[Sample], part: Part, digits: int) -> list[Sample]:
    """Strings of exactly ``digits`` words, no recording in two of them; the same ones, in the same order, always.

    Raises:
        UserError: no speaker has enough recordings.
    """
    rng = seeding.generator(0, strings=digits, part=part)
    groups = by_speaker([samples[i] for i in rng.permutation(len(samples))])
    named = [
        (f"{group} {at // digits}", words[at : at + digits])
        for group, words in groups.items() for at in range(0, len(words) - digits + 1, digits)
    ]  # fmt: skip
    if not named:
        raise UserError(f"no speaker of the {part} part has {digits} recordings; give more, or fewer digits")
    return [_string(rng, words, name) for name, words in [named[i] for i in rng.permutation(len(named))]]


def paced(rng: np.random.Generator, sound: Tensor, stretch: float) -> Tensor:
    """A recording read a little faster or slower."""
    return at_pace(sound, float(rng.uniform(1 - stretch, 1 + stretch)))


def at_pace(sound: Tensor, pace: float) -> Tensor:
    """A recording read faster, by a pace above 1, or slower; its pitch follows."""
    length = max(1, round(len(sound) / pace))
    return interpolate(sound[None, None], length, mode="linear", align_corners=True)[0, 0]


def spoken(rng: np.random.Generator, words: Sequence[Tensor]) -> Tensor:
    """Recordings with gaps before, between and behind them, all in a little noise."""
    parts = [torch.zeros(int(rng.uniform(0, _GAP) * RATE))]
    for word in words:
        parts += [word, torch.zeros(int(rng.uniform(0, _GAP) * RATE))]
    sound = torch.cat(parts)
    return sound + _NOISE * torch.from_numpy(rng.standard_normal(len(sound), dtype=np.float32))


def _string(rng: np.random.Generator, words: Sequence[Sample], name: str) -> Sample:
    """Recordings of one speaker, put together."""
    sound = spoken(rng, [word.inputs for word in words])
    return Sample(name, words[0].group, words[0].part, sound, " ".join(word.target for word in words))


def _sound(path: Path) -> Tensor:
    """A recording at 8 kHz, mean 0 and variance 1, float32 ``[N]``."""
    sound = torch.from_numpy(read_recording(path, RATE, _LONGEST))
    return (sound - sound.mean()) / sound.std().clamp(min=1e-6)


def aligned(spoken: Sequence[str], recognised: Sequence[str]) -> Any:
    """What jiwer says of transcripts: ``wer`` of all, and which words became which.

    Raises:
        UserError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise UserError("word error rates need jiwer: pip install 'manyheads[train]'") from error
    return jiwer.process_words(list(spoken), list(recognised))


def word_errors(spoken: str, recognised: str) -> dict[str, float]:
    """The metrics of :data:`WER` for one string."""
    wrong = float(aligned([spoken], [recognised]).wer)
    return {"wer": wrong, "exact": float(wrong == 0)}
