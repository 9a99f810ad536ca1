# SPDX-License-Identifier: Apache-2.0
"""Strings of spoken digits in noise, written down by a model that reads a frozen encoder: word error rate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.audio import read_recording
from ...experiment import Metric, seeding
from ...recipe import Batch, Part, Picture, Sample
from ._ctc import best_paths, ctc_mean
from ._digits import WER, SpokenDigits, by_speaker, word_errors
from ._encoder import RATE
from ._whisper import WIDTH, encoder_features, hypotheses

__all__ = ["END", "HIDDEN", "ROOM", "DigitTranscripts", "Stacked", "Transcriber"]

ROOM = 6  # words of a transcript, with the end
END, HIDDEN = 10, 11  # after the ten digits; the second begins a row and hides words. 10 is CTC's blank too


class Stacked(nn.Module):
    """Four frames side by side, projected: ``[B, T, 384]`` -> ``[B, T / 4, dim]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(WIDTH), nn.Linear(4 * WIDTH, dim)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.project(self.norm(features).unflatten(1, (-1, 4)).flatten(2))
        return found


class Transcriber(nn.Module):
    """Features ``[B, T, 384]`` and words ``[B, 6]`` -> logits ``[B, 6, 11]``; of CTC, ``[B, T / 4, 11]``.

    Attributes:
        size, frames: features of a frame, and frames of a recording.
        front: features -> ``[B, N, dim]``; a paper may put its own here.
        order: ``left`` (a word sees those before it), ``any`` (all), ``ctc`` (there are none).
        room, ends: words of a row, and the one that ends it.
    """

    def __init__(self, task: Any, width: int, order: str) -> None:
        super().__init__()
        dim, self.size, self.frames, self.order = task.dim, WIDTH, task.frames, order
        self.room, self.ends = ROOM, END
        self.front: nn.Module = Stacked(dim)
        self.places = nn.Parameter(0.02 * torch.randn(task.frames // 4 + ROOM, dim))
        self.words = nn.Embedding(HIDDEN + 1, dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, task.heads, width, task.dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(task.layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, END + 1)

    def forward(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        x = self.front(features)
        heard, mask = x.shape[1], None
        x = x + self.places[ROOM : ROOM + heard]
        if words is not None:
            x = torch.cat((x, self.words(words) + self.places[:ROOM]), 1)
            at = torch.arange(x.shape[1], device=x.device)
            if self.order == "left":  # what was heard sees itself, words see it and those before them
                mask = (at >= heard) & (at > at[:, None])
        for block in self.blocks:
            x = block(x, mask)
        found: Tensor = self.head(self.norm(x if words is None else x[:, heard:]))
        return found

    @staticmethod
    def texts(words: Tensor) -> list[str]:
        """Transcripts of rows ``[B, 6]``, each up to its first end."""
        found = []
        for row in words.tolist():
            upto = next((i for i, word in enumerate(row) if word >= END), len(row))
            found.append(" ".join(map(str, row[:upto])))
        return found


_LENGTH = 25_600  # samples of a string
_STRINGS: dict[Part, int] = {"train": 150, "validation": 60, "test": 90}  # of a speaker
_GAP = 0.1  # seconds of silence at most between words
_NOISE = (0.0, 15.0)  # dB of signal over noise


@dataclass(frozen=True, kw_only=True)
class DigitTranscripts(SpokenDigits):
    """Strings of two to five digits of the Free Spoken Digit Dataset, put together, in white noise of 0 to 15 dB.

    Four speakers are trained on, one validates, one tests; every recording of the last two is in one string at most. A
    model reads the last hidden states of the encoder of Whisper tiny.en, frozen and made once for each string, and
    writes words, of which there are ten. A batch has ``hypotheses``, a function that gives what Whisper itself, reading
    30 seconds, says of the strings, greedily: words ``[B, 6]``, the digits that are in it, and no more than there is
    room for. It is asked when they are first wanted. The word error rate is a mean over strings, a short one as much as
    a long one. Intervals are over strings and trainings, not speakers.

    References: an autoregressive decoder, and CTC.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (*WER, Metric("length_error", "words too many or too few", "words"))
    published: ClassVar[tuple[str, ...]] = ("whisper-tiny.en",)
    references: ClassVar[tuple[str, ...]] = ("autoregressive", "ctc")

    dim: int = 64
    layers: int = 3
    frames: ClassVar[int] = 160  # of a string, 50 a second

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        found = []
        for speaker, words in by_speaker(sorted(super().read(folder), key=lambda sample: sample.name)).items():
            part = words[0].part
            rng = seeding.generator(0, transcripts=speaker)
            left = list(rng.permutation(len(words)))
            for number in range(_STRINGS[part]):
                count = int(rng.integers(2, ROOM))
                if part == "train":
                    own = [words[int(i)] for i in rng.integers(0, len(words), count)]
                else:
                    own, left = [words[i] for i in left[:count]], left[count:]
                if len(own) == count:
                    found.append(_string(rng, own, f"{speaker} {number}"))
        return sorted(found, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())

    @classmethod
    def open(cls, path: Path) -> Sample:
        heard = torch.from_numpy(read_recording(path, RATE, _LENGTH / RATE))
        whole = torch.zeros(_LENGTH)
        whole[: len(heard)] = heard - heard.mean()
        return Sample(path.name, "", "test", whole / whole.std().clamp(min=1e-6))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        sounds = [sample.inputs for sample in samples]
        batch: dict[str, Any] = {
            "inputs": torch.stack(encoder_features(sounds, RATE)), "hypotheses": partial(_hypotheses, sounds),
        }  # fmt: skip
        if any(sample.target is None for sample in samples):
            return batch
        return {**batch, "targets": torch.stack([_row(sample.target) for sample in samples])}

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """A decoder that fills in words in any order, with these blocks, ``block(x [B, N, dim], mask)``."""
        model = Transcriber(self, self.width or 2 * self.dim, "any")
        model.blocks = nn.ModuleList(blocks)
        return model

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return Transcriber(self, width, "ctc" if kind == "ctc" else "left")

    def loss(self, model: Any, batch: Batch) -> Tensor:
        targets = batch["targets"]
        if model.order == "ctc":
            words = torch.where(targets == END, 1, targets + 1)  # behind the blank
            return ctc_mean(*_blank_first(model(batch["inputs"])), words, (targets != END).sum(1))
        begun = torch.cat((torch.full_like(targets[:, :1], HIDDEN), targets[:, :-1]), 1)
        return cross_entropy(model(batch["inputs"], begun).float().flatten(0, 1), targets.flatten())

    def predict(self, model: Any, batch: Batch) -> list[str]:
        features = batch["inputs"]
        if model.order == "ctc":
            return best_paths(*_blank_first(model(features)))
        words = torch.full((len(features), ROOM + 1), HIDDEN, device=features.device)
        for i in range(ROOM):
            words[:, i + 1] = model(features, words[:, :ROOM])[:, i].argmax(-1)
        found: list[str] = model.texts(words[:, 1:])
        return found

    def score(self, sample: Sample, said: str) -> Mapping[str, float]:
        surplus = len(said.split()) - len(sample.target.split())
        return {**word_errors(sample.target, said), "length_error": float(abs(surplus))}

    def truth(self, sample: Sample) -> str:
        return str(sample.target)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        """How many words were spoken and written."""
        counts = np.zeros((ROOM, ROOM + 1))
        for sample, one in zip(samples, said, strict=True):
            counts[len(sample.target.split()), min(len(one.split()), ROOM)] += 1
        rows = [str(i) for i in range(2, ROOM)]
        values = (counts[2:] / counts[2:].sum(1, keepdims=True).clip(min=1)).tolist()
        return (Picture("words", rows, [str(i) for i in range(ROOM + 1)], values, ("spoken", "written")),)


def _string(rng: np.random.Generator, words: Sequence[Sample], name: str) -> Sample:
    """Recordings of one speaker after each other, as many as there is room for, in noise from the first to the last."""
    sound, at, said = torch.zeros(_LENGTH), int(rng.uniform(0, _GAP) * RATE), []
    for word in words:
        if at + len(word.inputs) > _LENGTH:
            break
        sound[at : at + len(word.inputs)] = word.inputs
        at += len(word.inputs) + int(rng.uniform(0, _GAP) * RATE)
        said.append(word.target)
    noise = 10 ** (-rng.uniform(*_NOISE) / 20) * rng.standard_normal(_LENGTH, dtype=np.float32)
    sound = sound + torch.from_numpy(noise)
    return Sample(name, words[0].group, words[0].part, sound / sound.std(), " ".join(said))


def _blank_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits whose last class is the blank, and a mask of all frames, as CTC's functions take them."""
    return logits.roll(1, -1), torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)


def _row(text: str) -> Tensor:
    """Words of a transcript, filled up with ends, int64 ``[6]``."""
    words = [int(digit) for digit in text.split()][:ROOM]
    return torch.tensor(words + [END] * (ROOM - len(words)))


def _hypotheses(sounds: Sequence[Tensor]) -> Tensor:
    return torch.stack([_row(text) for text in hypotheses(sounds, RATE)])
