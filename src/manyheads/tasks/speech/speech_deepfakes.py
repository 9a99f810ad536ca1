# SPDX-License-Identifier: Apache-2.0
"""Real speech told from resynthesised speech, of a speaker and by vocoders that no training has met: error rates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...data.audio import read_recording
from ...data.labelled import labelled
from ...data.vocoders import RATE, VOCODERS
from ...errors import UserError
from ...experiment import Metric, seeding
from ...recipe import Batch, Part, Picture, Sample
from .._field import MODEL_METRICS, FieldTask, parted
from .._rates import equal_error_rate_values
from .._statistics import auroc_values
from ._cepstra import COEFFICIENTS, Kind, cepstra
from ._verification import AttentiveStatistics
from ._whisper import WIDTH, encoder_features

__all__ = ["Detector", "Judgement", "OneView", "ScoreAverage", "SpeechDeepfakes"]


class OneView(nn.Module):
    """One of two views, normalised and projected: ``s [B, T, 384]``, ``c [B, F, 60]`` -> ``[B, T or F, dim]``."""

    def __init__(self, features: int, dim: int, spectral: bool) -> None:
        super().__init__()
        self.spectral, self.project = spectral, nn.Sequential(nn.LayerNorm(features), nn.Linear(features, dim))

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        found: Tensor = self.project(c if self.spectral else s)
        return found


class Convolution(nn.Module):
    """What is added to frames ``[B, T, D]``: a convolution over five of them to ``width`` features, and back."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Conv1d(dim, width, 5, padding=2), nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.dropout(nn.functional.gelu(self.up(self.norm(x).mT).mT)))
        return found


class Detector(nn.Module):
    """Views of a recording ``s [B, T, 384]`` and ``c [B, F, 60]`` -> logits ``[B, 1]`` of its being fake.

    Attributes:
        sizes: features of the two views.
        fuse: ``(s, c) -> [B, T, dim]``; a paper on fusion puts its own here.
    """

    def __init__(self, task: Any, width: int, spectral: bool = False) -> None:
        super().__init__()
        dim = task.dim
        self.sizes = (WIDTH, 3 * COEFFICIENTS)
        self.fuse: nn.Module = OneView(self.sizes[spectral], dim, spectral)
        self.blocks = nn.ModuleList(Convolution(dim, width, task.dropout) for _ in range(task.layers))
        self.pool, self.head = (
            AttentiveStatistics(dim, bias=True),
            nn.Sequential(nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 1)),
        )

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        x = self.fuse(s, c)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.head(self.pool(x))
        return found


class ScoreAverage(nn.Module):
    """Two detectors, each with a view of its own and each trained for itself: logits ``[B, 2]``."""

    def __init__(self, task: Any, width: int) -> None:
        super().__init__()
        self.detectors = nn.ModuleList(Detector(task, width, spectral) for spectral in (False, True))

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        return torch.cat([detector(s, c) for detector in self.detectors], -1)


_SEEN, _UNSEEN = ("griffin_lim", "lpc", "phase"), ("harmonic", "sinusoidal")
_EACH: dict[Part, int] = {"train": 8, "validation": 5, "test": 10}  # recordings of a speaker and digit
_MOST = 100  # recordings of a speaker of the user's
_NOISE = (20.0, 40.0)  # dB of signal over noise
_LONGEST = 600.0  # seconds of a recording of the user's

_OF_SET = (
    Metric(
        "eer", "equal error rate, unseen vocoders", floor=0.5,
        what="share of errors where as large a share of real speech is called fake as of fake speech real",
    ),
    Metric("auc", "area under the ROC curve, unseen vocoders", higher=True, floor=0.5),
    Metric("eer_seen", "equal error rate, vocoders of the training"),
    *(Metric(f"eer_{name}", f"equal error rate, {name}") for name in _UNSEEN),
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """What is said of a recording.

    Attributes:
        logit: of the probability that it is fake.
    """

    logit: float

    @property
    def probability(self) -> float:
        """That it is fake."""
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.logit))))

    def __str__(self) -> str:
        return f"fake with probability {self.probability:.3f}"


@dataclass(frozen=True, kw_only=True)
class SpeechDeepfakes(FieldTask):
    """Recordings of the Free Spoken Digit Dataset, and what vocoders make of the same recordings.

    Four speakers are trained on, one validates, one tests. Fakes of the first five are Griffin and Lim's, an LPC
    vocoder's, and those of random phases; of the test speaker there are also a harmonic source and filter and a
    sinusoidal model, which no training has met (:mod:`manyheads.data.vocoders`). Real and fake recordings are of the
    same words, as long and as loud, repeated or cut to one second (the loudest), and in white noise of 20 to 40 dB, so
    that neither length, level nor silence tells them apart. A batch has as many real recordings as fakes.

    Two views of a recording: cepstral coefficients, and the last hidden states of the encoder of Whisper tiny.en,
    frozen. Whisper was trained to recognise words, with labels: it stands in for a self-supervised model (the paper's
    is of the wav2vec kind), and is none.

    Equal error rates and areas are of a whole test set: its real recordings with the fakes of one kind. Intervals are
    over recordings (one with all fakes of it) and trainings, not over speakers, of whom the test part has one. The
    learning rate is chosen by the cross-entropy on the validation part, whose vocoders are those of the training.

    Attributes:
        spectral: which coefficients: ``lfcc``, ``mfcc`` or ``cqcc``.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("nll", "held-out cross-entropy, nats/recording", "nats/recording"),)
    files: ClassVar[tuple[str, ...]] = ("fsdd", "free-spoken-digit-dataset")
    published: ClassVar[tuple[str, ...]] = ("whisper-tiny.en",)
    takes: ClassVar[str] = (
        "a folder of real recordings, WAV files named speaker_anything.wav, of three speakers or more; fakes are made "
        "of them"
    )
    references: ClassVar[tuple[str, ...]] = ("pretrained_features", "spectral_features", "score_average")

    dim: int = 48
    layers: int = 1
    width: int = 128
    batch: int = 32
    spectral: Kind = "lfcc"

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.metrics, *_OF_SET, *MODEL_METRICS)

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        found = []
        for name, speaker, part, sound in _recordings(folder):
            for kind in ("real", *_SEEN, *(_UNSEEN if part == "test" else ())):
                rng = seeding.generator(0, deepfake=name, kind=kind)
                heard = sound if kind == "real" else VOCODERS[kind](sound, rng)
                about = {"context": name, "vocoder": kind}
                found.append(
                    Sample(f"{name} {kind}", speaker, part, _noisy(rng, heard), int(kind != "real"), about=about)
                )
        return sorted(found, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", torch.from_numpy(_second(_sound(path))).float())

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        labels = sorted({sample.target for sample in samples})
        kinds = [[sample for sample in samples if sample.target == label] for label in labels]
        turns = (kinds[i % len(kinds)] for i in range(self.batch))  # as many of one as of the other
        return [of[int(rng.integers(len(of)))] for of in turns]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        sounds = [sample.inputs for sample in samples]
        batch = {
            "inputs": torch.stack(encoder_features(sounds, RATE)),
            "spectral": torch.stack([_coefficients(sound, self.spectral) for sound in sounds]),
        }
        if any(sample.target is None for sample in samples):
            return batch
        return {**batch, "targets": torch.tensor([float(sample.target) for sample in samples])}

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """A detector with these blocks, ``block(x [B, T, dim]) -> [B, T, dim]``, added to what they are given."""
        model = Detector(self, self.width)
        model.blocks = nn.ModuleList(blocks)
        return model

    def reference(self, width: int, kind: str = "") -> nn.Module:
        kind = kind or self.references[0]
        return ScoreAverage(self, width) if kind == "score_average" else Detector(self, width, kind[:8] == "spectral")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["inputs"], batch["spectral"])
        return binary_cross_entropy_with_logits(logits.float(), batch["targets"][:, None].expand_as(logits))

    def predict(self, model: nn.Module, batch: Batch) -> list[Judgement]:
        return [Judgement(one) for one in model(batch["inputs"], batch["spectral"]).float().mean(1).tolist()]

    def score(self, sample: Sample, said: Judgement) -> Mapping[str, float]:
        return {"nll": float(np.logaddexp(0, said.logit * (1 - 2 * sample.target)))}

    def scores(self, samples: Sequence[Sample], said: Sequence[Judgement]) -> list[Mapping[str, float]]:
        found = [dict(self.score(sample, one)) for sample, one in zip(samples, said, strict=True)]
        kinds = np.array([sample.about["vocoder"] for sample in samples])
        logits, fake = np.array([one.logit for one in said]), np.array([bool(sample.target) for sample in samples])
        sets = {"eer": _UNSEEN, "auc": _UNSEEN, "eer_seen": _SEEN, **{f"eer_{name}": (name,) for name in _UNSEEN}}
        for metric, fakes in sets.items():
            which = np.flatnonzero(np.isin(kinds, ["real", *fakes]))
            if not 0 < fake[which].sum() < len(which):
                continue  # a set with real speech and none of these fakes has no such figure
            if metric == "auc":
                values = auroc_values(logits[which], fake[which], np.zeros(len(which)))
            else:
                values = equal_error_rate_values(logits[which], fake[which])
            for i, value in zip(which, values, strict=True):
                found[i][metric] = float(value)
        return list(found)

    def truth(self, sample: Sample) -> Judgement:
        return Judgement(20.0 if sample.target else -20.0)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        """Deciles of the probabilities by kind of speech."""
        kinds, at = ["real", *_SEEN, *_UNSEEN], np.linspace(0, 1, 11)
        by = {kind: [j.probability for s, j in zip(samples, said, strict=True) if s.about["vocoder"] == kind]
              for kind in kinds}  # fmt: skip
        rows = [kind for kind in kinds if by[kind]]
        shares = [(np.histogram(by[kind], at)[0] / len(by[kind])).tolist() for kind in rows]
        columns = [f"{low:.1f}" for low in at[:-1]]
        return (Picture("probability of being fake", rows, columns, shares, ("kind of speech", "probability, from")),)


_coefficients = cache(cepstra)  # of a recording, kept with it


def _recordings(folder: Path | None) -> Iterable[tuple[str, str, Part, Any]]:
    """Name, speaker, part and a second of sound of what fakes are made of."""
    taken: dict[tuple[str, int], int] = {}
    if folder is None:
        for item in labelled("fsdd").items:
            key = (item.group, item.label)
            if taken.setdefault(key, 0) < _EACH[item.part]:
                taken[key] += 1
                yield item.name, item.group, item.part, _second(item.values[:, 0].double().numpy())
        return
    named = [(path, path.stem.partition("_")[0]) for path in sorted(folder.glob("*_*.wav"))]
    if not named:
        raise UserError(f"{folder} holds no recording that can be used; it should be {SpeechDeepfakes.takes}")
    home = parted([who for _, who in named])
    for path, who in named:
        if taken.setdefault((who, 0), 0) < _MOST:
            taken[who, 0] += 1
            yield path.stem, who, home[who], _second(_sound(path))


def _sound(path: Path) -> Any:
    """A recording at 8 kHz, float64 ``[N]``."""
    return read_recording(path, RATE, _LONGEST).astype(np.float64)


def _second(sound: Any) -> Any:
    """The loudest second of a recording, or the recording repeated until it has one; mean 0 and variance 1."""
    sound = np.resize(sound, max(RATE, len(sound)))
    loud = np.cumsum(np.concatenate(([0.0], np.square(sound - sound.mean()))))
    first = int((loud[RATE:] - loud[:-RATE]).argmax())
    return _standard(sound[first : first + RATE])


def _standard(sound: Any) -> Any:
    return (sound - sound.mean()) / max(float(sound.std()), 1e-6)


def _noisy(rng: np.random.Generator, sound: Any) -> Tensor:
    """In white noise, at the level that all have."""
    noise = 10 ** (-rng.uniform(*_NOISE) / 20) * rng.standard_normal(len(sound))
    return torch.from_numpy(_standard(_standard(sound) + noise)).float()
