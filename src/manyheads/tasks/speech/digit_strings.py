# SPDX-License-Identifier: Apache-2.0
"""Strings of spoken digits by speakers that no training has seen, recognised by CTC: word error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from ...data.audio import read_wave, resampled
from ...data.labelled import labelled
from ...errors import UserError
from ...experiment import Metric, seeding
from ...recipe import Batch, Part, Picture, Sample
from .._field import parted
from ._ctc import CTCTask, Transcript, ctc_losses
from ._encoder import MELS, RATE, log_mel

__all__ = ["DigitStrings", "drawn_strings", "fixed_strings", "paced"]

_GAP = 0.1  # seconds of near silence at most, before, between and behind words
_NOISE = 0.01  # of the recordings' own deviation: no silence is digital
_LONGEST = 30.0  # seconds of a recording of the user's


@dataclass(frozen=True, kw_only=True)
class DigitStrings(CTCTask):
    """The Free Spoken Digit Dataset: recordings of one speaker, put together with short gaps.

    Four speakers are trained on, one validates, one tests. Training draws strings of 1 to ``digits`` words anew at each
    step, each word read a little faster or slower. What is judged are strings of exactly ``digits`` words; every
    recording of the part is in one of them at most, so that strings are independent, and the mean over strings is the
    word error rate of all. Intervals are over strings and trainings, not over speakers, of whom the test part has one.

    Attributes:
        digits: words of a string.
        stretch: how much faster or slower a word may be read in training, as a share.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "wer", "word error rate", "errors/word", floor=0.8,
            what="wrong, missing and surplus digits by the number of digits spoken (jiwer); guesses have 0.8 to 1",
        ),
        Metric("exact", "strings without an error", higher=True, kind="share"),
        Metric("ctc_nll", "held-out CTC loss, nats/word", "nats/word"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("fsdd", "free-spoken-digit-dataset")
    takes: ClassVar[str] = "a folder of WAV files named digit_speaker_number.wav, of three speakers or more"

    classes: ClassVar[int] = 11  # the blank, then ten digits

    digits: int = 4
    stretch: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits < 1 or not 0 <= self.stretch < 1:
            raise UserError("digits count, 1 or more; stretch is a share below 1")

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

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        return drawn_strings(rng, samples, self.batch, self.digits, self.stretch)

    def judged(self, part: Part) -> Sequence[Sample]:
        return fixed_strings(self.samples(part), part, self.digits)[: self.samples_judged]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        frames = [log_mel(sample.inputs) for sample in samples]
        inputs = pad_sequence(frames, batch_first=True)
        mask = torch.arange(inputs.shape[1]) < torch.tensor([len(one) for one in frames])[:, None]
        if any(sample.target is None for sample in samples):
            return {"inputs": inputs, "mask": mask}
        targets = [torch.tensor([int(digit) + 1 for digit in sample.target.split()]) for sample in samples]
        counts = torch.tensor([len(one) for one in targets])
        return {"inputs": inputs, "mask": mask, "targets": pad_sequence(targets, batch_first=True), "counts": counts}

    def score(self, sample: Sample, said: Transcript) -> Mapping[str, float]:
        words = sample.target.split()
        targets, counts = torch.tensor([[int(digit) + 1 for digit in words]]), torch.tensor([len(words)])
        mask = torch.ones(1, len(said.log_probs), dtype=torch.bool)
        loss = ctc_losses(said.log_probs[None], mask, targets, counts)
        wrong = float(_aligned([sample.target], [said.text]).wer)
        return {"wer": wrong, "exact": float(wrong == 0), "ctc_nll": float(loss) / len(words)}

    def truth(self, sample: Sample) -> Transcript:
        path = [k for digit in sample.target.split() for k in (int(digit) + 1, 0)]
        sure = torch.full((len(path), self.classes), 1e-4).scatter_(1, torch.tensor(path)[:, None], 1.0)
        return Transcript(sample.target, sure.log().log_softmax(-1))

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        digits = list("0123456789")
        counts = np.zeros((11, 11))
        found = _aligned([sample.target for sample in samples], [one.text for one in said])
        for words, heard, chunks in zip(found.references, found.hypotheses, found.alignments, strict=True):
            for chunk in chunks:
                pairs = range(max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx))
                for i in pairs:
                    row = 10 if chunk.type == "insert" else int(words[chunk.ref_start_idx + i])
                    column = 10 if chunk.type == "delete" else int(heard[chunk.hyp_start_idx + i])
                    counts[row, column] += 1
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        confusion = Picture("digits", [*digits, "none"], [*digits, "missed"], shares, ("spoken", "recognised"))
        sample, one = samples[0], said[0]
        mel, place = log_mel(sample.inputs)[::4][: len(one.log_probs)], np.arange(len(one.log_probs))
        low, high = mel.amin(), mel.amax()
        map_ = torch.cat((((mel - low) / (high - low)).flip(1), one.log_probs.exp()[: len(mel)]), 1).T
        rows = [*(f"m{MELS - i}" for i in range(MELS)), "blank", *digits]
        times = [f"{0.04 * i:.2f}" for i in place]
        title = f"{sample.target}: recognised {one.text or 'nothing'}"
        return confusion, Picture(
            title, rows, times, map_.tolist(), ("energies of mel filters, then probabilities", "seconds")
        )


def drawn_strings(
    rng: np.random.Generator, samples: Sequence[Sample], count: int, digits: int, stretch: float
) -> list[Sample]:
    """Strings of 1 to ``digits`` words, each word read faster or slower by a share of ``stretch`` at most."""
    made, groups = [], dict[str, list[Sample]]()
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
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
    rng, groups = seeding.generator(0, strings=digits, part=part), dict[str, list[Sample]]()
    for i in rng.permutation(len(samples)):
        groups.setdefault(samples[i].group, []).append(samples[i])
    named = [
        (f"{group} {at // digits}", words[at : at + digits])
        for group, words in groups.items() for at in range(0, len(words) - digits + 1, digits)
    ]  # fmt: skip
    if not named:
        raise UserError(f"no speaker of the {part} part has {digits} recordings; give more, or fewer digits")
    return [_string(rng, words, name) for name, words in [named[i] for i in rng.permutation(len(named))]]


def paced(rng: np.random.Generator, sound: Tensor, stretch: float) -> Tensor:
    """A recording read a little faster or slower."""
    length = max(1, round(len(sound) / float(rng.uniform(1 - stretch, 1 + stretch))))
    return interpolate(sound[None, None], length, mode="linear", align_corners=True)[0, 0]


def _string(rng: np.random.Generator, words: Sequence[Sample], name: str) -> Sample:
    """Recordings of one speaker with gaps before, between and behind them, all in a little noise."""
    parts = [torch.zeros(int(rng.uniform(0, _GAP) * RATE))]
    for word in words:
        parts += [word.inputs, torch.zeros(int(rng.uniform(0, _GAP) * RATE))]
    sound = torch.cat(parts)
    sound = sound + _NOISE * torch.from_numpy(rng.standard_normal(len(sound), dtype=np.float32))
    return Sample(name, words[0].group, words[0].part, sound, " ".join(word.target for word in words))


def _sound(path: Path) -> Tensor:
    """A recording at 8 kHz, mean 0 and variance 1, float32 ``[N]``."""
    found, rate = read_wave(path)
    if not 0 < len(found) / rate <= _LONGEST:
        raise UserError(f"{path} has {len(found) / rate:.1f} s; recordings have more than 0 and at most {_LONGEST:g} s")
    sound = torch.from_numpy(resampled(found, rate, RATE))
    return (sound - sound.mean()) / sound.std().clamp(min=1e-6)


def _aligned(spoken: list[str], recognised: list[str]) -> Any:
    """What jiwer says of transcripts."""
    try:
        import jiwer
    except ImportError as error:
        raise UserError("word error rates need jiwer: pip install 'manyheads[train]'") from error
    return jiwer.process_words(spoken, recognised)
