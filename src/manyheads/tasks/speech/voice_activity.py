# SPDX-License-Identifier: Apache-2.0
"""Where is speech? Frames of unseen speakers in unseen noises: detection error rate and AUROC by recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...attention.masks import padded
from ...errors import UserError, refusal
from ...experiment import Metric, RunContext, seeding
from ...recipe import Batch, Part, Picture, Sample
from ._cepstra import COEFFICIENTS, normalised_mfcc
from ._digits import SpokenDigits, by_speaker
from ._encoder import RATE
from ._mixtures import FRAME, mixed, stream
from ._whisper import WIDTH, windowed

__all__ = ["SECONDS", "Activity", "OneStream", "VadModel", "VoiceActivity"]

SECONDS = FRAME / RATE  # of a frame


@dataclass(frozen=True, eq=False)
class Activity:
    """What is said of a recording.

    Attributes:
        speech: probability of speech by frame of 20 ms, ``[T]``.
    """

    speech: Tensor

    def __str__(self) -> str:
        said = [0, *(self.speech >= 0.5).int().tolist(), 0]
        at = [i for i, (one, other) in enumerate(pairwise(said)) if one != other]
        return ", ".join(f"{a * SECONDS:.2f}-{b * SECONDS:.2f}" for a, b in zip(at[::2], at[1::2], strict=True))


class VadModel(nn.Module):
    """Two streams of frames, MFCC and Whisper's, each brought to ``dim``, fused, and read by a bidirectional LSTM.

    Args:
        fusion: ``fusion(mfcc [B, T, dim], whisper [B, T, dim], mask [B, T]) -> [B, T, size]``.
        size: of what it gives.
        dim: of layers.
        states: of Whisper.
        hidden: of each direction of the LSTM.
        layers: of it.
        dropout: between layers.
    """

    def __init__(
        self, fusion: nn.Module, size: int, dim: int, states: int, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.mfcc, self.whisper = nn.Linear(COEFFICIENTS, dim), nn.Linear(states, dim)
        self.fusion, drop = fusion, nn.Dropout(dropout)
        self.before = nn.Sequential(nn.Linear(size, dim), nn.GELU(), drop, nn.Linear(dim, dim), nn.GELU())
        self.recurrent = nn.LSTM(
            dim, hidden, layers, batch_first=True, bidirectional=True, dropout=dropout * (layers > 1)
        )
        self.after = nn.Sequential(nn.Linear(2 * hidden, dim), nn.GELU(), drop, nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Linear(dim, 1)

    def forward(self, cepstra: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Logits of speech ``[B, T]``."""
        x = self.before(self.fusion(self.mfcc(cepstra), self.whisper(states), mask))
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=x.shape[1])
        logits: Tensor = self.head(self.after(x))[..., 0]
        return logits


class OneStream(nn.Module):
    """One of two streams alone."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, mfcc: Tensor, whisper: Tensor, mask: Tensor) -> Tensor:
        return (mfcc, whisper)[self.which]


_TRAINED, _TESTED = ("white", "pink", "hum"), ("brown", "clatter", "babble")
_RATIOS = (-5.0, 0.0, 5.0, 10.0, 20.0)  # dB, in turn where models are judged
_EACH = 6  # recordings of a stream that is judged, of which none is in two streams as long as they last


@dataclass(frozen=True, kw_only=True)
class VoiceActivity(SpokenDigits):
    """Recordings of the Free Spoken Digit Dataset between silences of 0.1 to 1.2 s, four seconds in all, in noise.

    Four speakers are trained on, one validates, one tests. A frame of 20 ms is speech if it lies between the first and
    the last frame of a recording that is less than 35 dB below its loudest. Training draws from ``pool`` streams in
    white and pink noise and hum at -5 to 20 dB; the test is in brown noise, clatter, and a babble of six reversed
    voices of the training, at -5, 0, 5, 10 and 20 dB in turn. Whisper's encoder is frozen: a process keeps the features
    of every stream. Intervals are over streams and trainings, not over speakers or noises, of which there are few.

    Attributes:
        pool: streams that training draws from.
        frames: of a stream.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("der", "detection error rate", "errors/speech",
               what="frames missed and falsely found, by the number of frames of speech; threshold 0.5"),
        Metric("auc", "AUROC of frames", higher=True, kind="share", floor=0.5),
        Metric("f1", "F1 of frames", higher=True, kind="share"),
        Metric("miss", "speech that is missed", kind="share"),
        Metric("false_alarm", "silence that is taken for speech", kind="share"),
        Metric("frame_nll", "held-out loss, nats/frame", "nats/frame"),
    )  # fmt: skip
    references: ClassVar[tuple[str, ...]] = ("whisper", "mfcc")
    published: ClassVar[tuple[str, ...]] = ("whisper-tiny.en",)

    pool: int = 400
    frames: int = 200

    def unsupported_reason(self, run: RunContext) -> str | None:
        return super().unsupported_reason(run) or refusal(lambda: windowed(torch.randn(FRAME), RATE))

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        words, made = _sounds(tuple(samples)), []
        for number in rng.integers(0, self.pool, self.batch).tolist():
            own = seeding.generator(0, drawn=number)
            speaker = sorted(words)[int(own.integers(len(words)))]
            picked = [words[speaker][int(i)] for i in own.integers(0, len(words[speaker]), 2 * _EACH)]
            kind, snr = _TRAINED[int(own.integers(len(_TRAINED)))], round(float(own.uniform(-5, 20)), 1)
            made.append(self._sample("drawn", speaker, "train", tuple(picked), kind, snr, number))
        return made

    def judged(self, part: Part) -> Sequence[Sample]:
        words = _sounds(tuple(self.samples(part)))
        rest = {who: seeding.generator(0, part=part, who=who).permutation(len(some)) for who, some in words.items()}
        kinds = _TESTED if part == "test" else _TRAINED
        most, made = sum(max(1, len(some) // _EACH) for some in words.values()), []
        for i in range(min(self.samples_judged, most)):
            who = sorted(words)[i % len(words)]
            first = i // len(words) * _EACH
            picked = tuple(words[who][n] for n in np.roll(rest[who], -first)[:_EACH])
            kind, snr = kinds[i % len(kinds)], _RATIOS[i // len(kinds) % len(_RATIOS)]
            made.append(self._sample(f"{who} {i} {kind} {snr:g} dB", who, part, picked, kind, snr, i))
        return made

    def _sample(
        self, name: str, who: str, part: Part, words: tuple[Tensor, ...], kind: str, snr: float, seed: int
    ) -> Sample:
        babble = tuple(sample.inputs for sample in self.samples("train")[:200])
        sound, labels = _mixture(words, babble, kind, snr, seed, self.frames)
        return Sample(name, who, part, sound, labels, {"noise": kind, "snr": snr})

    def collate(self, samples: Sequence[Sample]) -> Batch:
        read = [_read_sound(sample.inputs) for sample in samples]
        (cepstra, mask), (states, _) = (padded(some) for some in zip(*read, strict=True))
        batch = {"inputs": cepstra, "states": states, "mask": mask}
        if all(sample.target is not None for sample in samples):
            batch["targets"], _ = padded([sample.target.float() for sample in samples])
        return batch

    def around(self, blocks: Sequence[nn.Module], size: int = 0, width: int = 0) -> nn.Module:
        """A fusion, the one block, in the task's model; ``size`` is of what it gives, ``width`` the LSTM's."""
        (fusion,) = blocks
        return VadModel(fusion, size or self.dim, self.dim, WIDTH, width or self.dim, self.layers, self.dropout)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return self.around([OneStream(int((kind or self.references[0]) == "whisper"))], width=width)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["inputs"], batch["states"], batch["mask"]).float()
        losses = binary_cross_entropy_with_logits(logits, batch["targets"], reduction="none")
        mean: Tensor = losses[batch["mask"]].mean()
        return mean

    def predict(self, model: nn.Module, batch: Batch) -> list[Activity]:
        speech = model(batch["inputs"], batch["states"], batch["mask"]).float().sigmoid().cpu()
        return [Activity(row[:count]) for row, count in zip(speech, batch["mask"].sum(1).tolist(), strict=True)]

    def score(self, sample: Sample, said: Activity) -> Mapping[str, float]:
        try:
            from torchmetrics.functional.classification import binary_auroc
        except ImportError as error:
            raise UserError("AUROC needs torchmetrics: pip install 'manyheads[train]'") from error
        there, found = sample.target.numpy(), (said.speech >= 0.5).numpy()
        missed, false, both = (int(x.sum()) for x in (there & ~found, ~there & found, there & found))
        sure = said.speech.double().clamp(1e-6, 1 - 1e-6)
        right = torch.where(sample.target, sure, 1 - sure)
        odds = sure.logit().mul(1000).round() / 1000  # frames that differ by rounding alone are tied
        return {
            "der": (missed + false) / there.sum(), "auc": float(binary_auroc(odds.sigmoid(), sample.target.int())),
            "f1": 2 * both / (2 * both + missed + false), "miss": missed / there.sum(),
            "false_alarm": false / (~there).sum(), "frame_nll": float(-right.log().mean()),
        }  # fmt: skip

    def truth(self, sample: Sample) -> Activity:
        return Activity(sample.target.float())

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        """What is said of the first recording, under its labels."""
        sample, one = samples[0], said[0]
        columns = [f"{SECONDS * i:.2f}" for i in range(len(one.speech))]
        rows = [sample.target.float().tolist(), one.speech.tolist()]
        return (Picture(f"speech: {sample.name}", ["labels", "found"], columns, rows, ("speech", "seconds")),)


@lru_cache(maxsize=16)
def _sounds(samples: tuple[Sample, ...]) -> dict[str, list[Tensor]]:
    """Recordings by speaker, in order of their names."""
    found = by_speaker(sorted(samples, key=lambda sample: sample.name))
    return {who: [sample.inputs for sample in own] for who, own in found.items()}


@lru_cache(maxsize=4000)
def _mixture(
    words: tuple[Tensor, ...], babble: tuple[Tensor, ...], kind: str, snr: float, seed: int, frames: int
) -> tuple[Tensor, Tensor]:
    """A noisy stream ``[frames * 160]`` and its labels ``[frames]``."""
    rng = seeding.generator(0, mixture=seed, kind=kind)
    sound, labels = stream(rng, words, frames)
    return mixed(rng, sound, labels, kind, snr, babble), torch.from_numpy(labels)


@lru_cache(maxsize=4000)
def _read_sound(sound: Tensor) -> tuple[Tensor, Tensor]:
    """MFCC and Whisper's states of a recording, kept, since neither is trained."""
    return normalised_mfcc(sound), windowed(sound, RATE)
