# SPDX-License-Identifier: Apache-2.0
"""Is this the same speaker saying the same phrase? Pairs of recordings of unseen speakers: equal error rate."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...attention.masks import padded
from ...errors import UserError
from ...experiment import seeding
from ...recipe import Batch, Part, Sample
from ._digits import SpokenDigits, at_pace, spoken
from ._encoder import log_mel
from ._verification import VerificationTask

__all__ = ["SpeakerVerification"]

_PARTS: tuple[Part, ...] = ("test", "validation", "train")


@dataclass(frozen=True, kw_only=True)
class SpeakerVerification(SpokenDigits, VerificationTask):
    """The Free Spoken Digit Dataset, text-dependent: a phrase is two digits in an order, and its reverse another one.

    A model is trained to tell classes of voice and phrase apart, and judged by the cosine of two embeddings. Of four
    pairs with one enrolment two are targets, one is the same speaker's reversed phrase and one the next speaker's same
    phrase. A recording read at another pace counts as another voice (as in WeSpeaker), since three speakers are too
    few classes. Frames are normalised over each recording, so that a microphone's colour is no voice.

    A seed is a fold: of six speakers two are tested, one validates (its phrases only), three are trained on, and three
    folds test everybody once. Rates are chosen in each fold. Embeddings of two folds are never compared; a fold has its
    own threshold. With several seeds intervals count folds alone: pairs of speakers, of whom there are very few.

    Attributes:
        phrases: that there are, even, each with its reverse.
        paces: that voices are made by.
        variants: recordings of a class that training draws from.
    """

    takes: ClassVar[str] = "a folder of WAV files named digit_speaker_number.wav, of four speakers or more"

    phrases: int = 20
    paces: tuple[float, ...] = field(default=(0.8, 0.9, 1.0, 1.1, 1.25))
    variants: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phrases < 2 or self.phrases % 2 or not self.paces or min(self.paces) <= 0 or self.variants < 1:
            raise UserError("phrases are an even number, 2 or more; paces are above 0; variants count, 1 or more")

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        found = super().read(folder)
        home = _homes(sorted({sample.group for sample in found}))
        return [dataclasses.replace(sample, part=home[sample.group]) for sample in found]

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", log_mel(super().open(path).inputs))

    @classmethod
    def joined(cls, opened: Sequence[Sample]) -> Sample:
        name = " ".join(sample.name for sample in opened)
        return Sample(name, "", "test", tuple(sample.inputs for sample in opened))

    def samples(self, part: Part) -> Sequence[Sample]:
        return _folded(tuple(tuple(super(SpeakerVerification, self).samples(p)) for p in _PARTS), self.fold)[part]

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Pairs by turns of one class, and of two that differ in the order of digits or in the voice."""
        held, voices, phrases = _by_digit(tuple(samples)), self._voices(tuple(samples)), self._phrases()
        made = []
        for i in range(self.batch):
            voice, phrase = int(rng.integers(len(voices))), int(rng.integers(len(phrases)))
            other = voice, phrase
            if i % 2:
                far = int(rng.integers(1, len(voices))) if len(voices) > 1 and rng.random() < 0.5 else 0
                other = ((voice + far) % len(voices), phrase) if far else (voice, phrase ^ 1)
            chosen = [(v, p, int(rng.integers(self.variants))) for v, p in ((voice, phrase), other)]
            frames = tuple(self._variant(held, voices[v], phrases[p], variant) for v, p, variant in chosen)
            classes = tuple(v * len(phrases) + p for v, p, _ in chosen)
            speakers = {voices[v][0] for v, _, _ in chosen}
            about = {"classes": classes, "kind": "target"}
            made.append(Sample("drawn", min(speakers), "train", frames, classes[0] == classes[1], about))
        return made

    def _variant(self, held: Any, voice: tuple[str, float], phrase: tuple[str, str], variant: int) -> Tensor:
        """The same recordings for a variant whenever it is asked for."""
        speaker, pace = voice
        rng = seeding.generator(0, variant=variant, speaker=speaker, phrase="".join(phrase))
        words = [some[int(rng.integers(len(some)))].inputs for some in (held[speaker, digit] for digit in phrase)]
        return _utterance(words[0], words[1], pace, variant)

    def _voices(self, samples: tuple[Sample, ...]) -> list[tuple[str, float]]:
        speakers = sorted({speaker for speaker, _ in _by_digit(samples)})
        return [(speaker, pace) for speaker in speakers for pace in self.paces]

    def _phrases(self) -> list[tuple[str, str]]:
        """Pairs of digits that every speaker of the training has said; each is followed or preceded by its reverse."""
        digits = _said(_by_digit(tuple(self.samples("train"))))
        steps = ((digits[i], digits[(i + s) % len(digits)]) for s in range(1, len(digits)) for i in range(len(digits)))
        found: list[tuple[str, str]] = []
        for a, b in steps:
            if (a, b) not in found and len(found) < self.phrases:
                found += [(a, b), (b, a)]
        if not found:
            raise UserError("a phrase is two digits that every speaker has said, and there are none")
        return found

    def judged(self, part: Part) -> Sequence[Sample]:
        held = _by_digit(tuple(self.samples(part)))
        speakers, digits = sorted({speaker for speaker, _ in held}), _said(held)
        phrases = [phrase for phrase in self._phrases() if set(phrase) <= set(digits)]
        if not phrases:
            raise UserError(f"no phrase of the training can be made of what {' and '.join(speakers)} say")
        words: dict[tuple[str, str, int], Iterator[Tensor]] = {}
        for (speaker, digit), some in held.items():
            mixed = [some[i].inputs for i in seeding.generator(0, digit=digit, speaker=speaker).permutation(len(some))]
            for side in (0, 1):  # no recording is enrolled and tested
                words[speaker, digit, side] = cycle(mixed[side::2] or mixed)
        uses = max(sum(digit in phrase for phrase in phrases) for digit in digits)
        rounds = max(1, min(len(held[s, d]) // 2 for s in speakers for p in phrases for d in p) // uses)
        said = {
            (s, p, side, i): _utterance(next(words[s, p[0], side]), next(words[s, p[1], side]), 1.0, i)
            for i in range(rounds) for s in speakers for p in phrases for side in (0, 1)
        }  # fmt: skip
        chosen = [(speaker, phrase, i) for i in range(rounds) for speaker in speakers for phrase in phrases]
        order = seeding.generator(0, pairs=part).permutation(len(chosen))[: max(1, self.samples_judged // 4)]
        made = []
        for s, p, i in (chosen[n] for n in order):
            after, reverse, name = (i + 1) % rounds, (p[1], p[0]), f"{s} {''.join(p)} {i}"
            others = [other for other in speakers if other != s] or [s]
            last = ("speaker", others[i % len(others)], p, i) if len(speakers) > 1 else ("phrase", s, reverse, after)
            for tested in dict.fromkeys(
                (("target", s, p, i), ("phrase", s, reverse, i), ("target", s, p, after), last)
            ):
                kind, who, what, j = tested
                pair, about = (said[s, p, 0, i], said[who, what, 1, j]), {"kind": kind, "context": name}
                made.append(Sample(f"{name} {kind} {who} {j}", s, part, pair, kind == "target", about))
        return made

    def collate(self, samples: Sequence[Sample]) -> Batch:
        both = padded([one for sample in samples for one in sample.inputs])
        inputs, mask = (x.unflatten(0, (len(samples), 2)) for x in both)
        if not all("classes" in sample.about for sample in samples):
            return {"inputs": inputs, "mask": mask}
        return {"inputs": inputs, "mask": mask, "targets": torch.tensor([s.about["classes"] for s in samples])}

    @property
    def classes(self) -> int:
        """Voices and phrases that are trained on."""
        return len(self._voices(tuple(self.samples("train")))) * len(self._phrases())


def _homes(speakers: Sequence[str]) -> dict[str, Part]:
    """Speakers by part: the last fifth, two at least, are tested, before them half as many validate."""
    if len(speakers) < 4:
        raise UserError(
            f"there are {len(speakers)} speakers ({', '.join(speakers)}), and four are needed: one to train on, one to "
            "choose the learning rate by, and two to be told apart in the test"
        )
    tested = max(2, len(speakers) // 5)
    ends: tuple[tuple[Part, int], ...] = (("test", tested), ("validation", tested // 2), ("train", len(speakers)))
    parts = [part for part, count in ends for _ in range(count)]
    return dict(zip(reversed(speakers), parts, strict=False))


@lru_cache(maxsize=16)
def _folded(parts: tuple[tuple[Sample, ...], ...], fold: int) -> dict[Part, tuple[Sample, ...]]:
    """Samples by part where speakers have moved on, so many for each fold as are tested; ``parts`` as _PARTS."""
    speakers = [sorted({sample.group for sample in some}) for some in parts]
    order = [speaker for some in speakers for speaker in some]
    places = [part for part, some in zip(_PARTS, speakers, strict=True) for _ in some]
    home = {speaker: places[(i - fold * len(speakers[0])) % len(order)] for i, speaker in enumerate(order)}
    moved = [dataclasses.replace(s, part=home[s.group]) for some in parts for s in some]
    return {part: tuple(s for s in moved if s.part == part) for part in _PARTS}


@lru_cache(maxsize=16)
def _by_digit(samples: tuple[Sample, ...]) -> dict[tuple[str, str], list[Sample]]:
    """Recordings by speaker and digit, in order of their names."""
    found: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.name):
        found[sample.group, sample.target].append(sample)
    return found


def _said(held: Mapping[tuple[str, str], Sequence[Sample]]) -> list[str]:
    """Digits that all speakers have said, sorted."""
    speakers = {speaker for speaker, _ in held}
    return sorted({digit for _, digit in held if all((speaker, digit) in held for speaker in speakers)})


@lru_cache(maxsize=20_000)
def _utterance(first: Tensor, second: Tensor, pace: float, seed: int) -> Tensor:
    """Frames of two recordings with gaps, in a little noise."""
    return log_mel(spoken(seeding.generator(0, utterance=seed), [at_pace(word, pace) for word in (first, second)]))
