# SPDX-License-Identifier: Apache-2.0
"""Streams of spoken words between silences, in noise, with exact labels; MFCC and Whisper's features of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.audio import resampled
from ...errors import UserError
from ._encoder import RATE, log_mel

__all__ = ["COEFFICIENTS", "FRAME", "NOISES", "features", "mfcc", "mixed", "stream", "width_of"]

FRAME = 160  # samples of a frame of 20 ms, Whisper's
COEFFICIENTS = 20
_QUIET = 35.0  # dB below the loudest frame of a recording: its ends that are quieter are no speech
_SILENCE = (0.1, 1.2)  # seconds between words
_VOICES = 6  # of a babble
_WINDOW = 200  # frames that Whisper's encoder is given at once


def _coloured(power: float) -> Callable[[np.random.Generator, int, Sequence[Tensor]], Any]:
    """Noise whose power falls with that power of the frequency."""

    def made(rng: np.random.Generator, count: int, words: Sequence[Tensor]) -> Any:
        spectrum = np.fft.rfft(rng.standard_normal(count))
        return np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20) ** (power / 2), count)

    return made


def _hum(rng: np.random.Generator, count: int, words: Sequence[Tensor]) -> Any:
    """A machine: harmonics of a low tone, swelling slowly."""
    time, tone = np.arange(count) / RATE, rng.uniform(60, 300)
    swell = 1 + 0.5 * np.sin(2 * np.pi * (rng.uniform(0.3, 2) * time + rng.random()))
    return swell * sum(np.sin(2 * np.pi * (k * tone * time + rng.random())) / k for k in range(1, 9))


def _clatter(rng: np.random.Generator, count: int, words: Sequence[Tensor]) -> Any:
    """Blows at random, each of noise that dies away within a few hundredths of a second."""
    blows = (rng.random(count) < 8 / RATE) * rng.uniform(0.3, 1, count)
    dying = rng.standard_normal(RATE // 5) * np.exp(-np.arange(RATE // 5) / (0.03 * RATE))
    return np.convolve(blows, dying)[:count] + 0.01 * rng.standard_normal(count)


def _babble(rng: np.random.Generator, count: int, words: Sequence[Tensor]) -> Any:
    """Six voices at once, each backwards, so that they are no speech to be found."""
    total = np.zeros(count)
    for _ in range(_VOICES):
        parts: list[Any] = []
        while sum(map(len, parts)) < count:
            parts.append(words[int(rng.integers(len(words)))].numpy()[::-1])
        total += np.concatenate(parts)[:count]
    return total


NOISES: dict[str, Callable[[np.random.Generator, int, Sequence[Tensor]], Any]] = {
    "white": _coloured(0), "pink": _coloured(1), "hum": _hum, "brown": _coloured(2), "clatter": _clatter,
    "babble": _babble,
}  # fmt: skip


def stream(rng: np.random.Generator, words: Sequence[Tensor], frames: int) -> tuple[Any, Any]:
    """Words one after the other with silences of random length: float64 ``[frames * 160]``, bool ``[frames]``.

    It begins anywhere, also within a word, and goes through ``words`` as often as it takes.
    """
    before = int(rng.uniform(0, 1) * RATE)
    parts: list[Any] = []
    heard: list[Any] = []
    turn = 0
    while sum(map(len, parts)) < before + frames * FRAME:
        word = words[turn % len(words)].numpy()
        silence = np.zeros(int(rng.uniform(*_SILENCE) * RATE))
        parts += [word, silence]
        heard += [_spoken(word), silence > 0]
        turn += 1
    sound, labels = (np.concatenate(some)[before : before + frames * FRAME] for some in (parts, heard))
    return sound.astype(np.float64), labels.reshape(frames, FRAME).mean(1) >= 0.5


def _spoken(word: Any) -> Any:
    """Which samples lie between the first and the last frame that is not quiet."""
    whole = -(-len(word) // FRAME)
    energy = np.square(np.pad(word, (0, whole * FRAME - len(word)))).reshape(whole, FRAME).sum(1)
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (-_QUIET / 10))
    at = np.arange(len(word)) // FRAME
    return (at >= loud[0]) & (at <= loud[-1])


def mixed(rng: np.random.Generator, sound: Any, labels: Any, kind: str, snr: float, words: Sequence[Tensor]) -> Tensor:
    """A stream in noise at ``snr`` dB, the power of speech where there is some against that of the noise; float32."""
    noise = NOISES[kind](rng, len(sound), words)
    speech = np.square(sound)[np.repeat(labels, FRAME)].mean()
    noisy = sound + noise * np.sqrt(speech / np.square(noise).mean() / 10 ** (snr / 10))
    return torch.from_numpy((noisy / noisy.std()).astype(np.float32))


def mfcc(sound: Tensor) -> Tensor:
    """Cepstra of normalised log energies of mel filters by frame of 20 ms, float32 ``[N / 160, 20]``."""
    mel, count = log_mel(sound), len(sound) // FRAME
    frames = mel[: 2 * count].view(count, 2, -1).mean(1)
    wave = (torch.arange(frames.shape[1]) + 0.5) * math.pi / frames.shape[1]
    basis = (torch.arange(COEFFICIENTS)[:, None] * wave).cos() * math.sqrt(2 / frames.shape[1])
    basis[0] /= math.sqrt(2)  # a discrete cosine transform of the second kind, orthonormal
    return frames @ basis.T


@cache
def _encoder(name: str) -> tuple[Any, Any]:
    """Whisper's encoder for windows of four seconds, with the first of its positions, and what it reads by."""
    from ...models import load_speech

    model, extractor, _ = load_speech(name)
    whole: Any = model.get_encoder()
    config = type(whole.config)(**{**whole.config.to_dict(), "max_source_positions": _WINDOW})
    cut = type(whole)(config)
    state = whole.state_dict()
    state["embed_positions.weight"] = state["embed_positions.weight"][:_WINDOW]
    cut.load_state_dict(state)
    return cut.float().eval(), extractor


@cache
def width_of(name: str) -> int:
    """Features of the states of a model of Whisper's kind, by its configuration alone.

    Raises:
        UserError: it cannot be had.
    """
    from transformers import AutoConfig

    from ...models import source

    try:
        return int(AutoConfig.from_pretrained(source(name), trust_remote_code=False).d_model)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be had: put it into $MANYHEADS_MODELS, or be online") from error


def features(name: str, sound: Tensor) -> Tensor:
    """Last states of Whisper's encoder, frozen, by frame of 20 ms, float32 ``[N / 160, dim]``; windows of 4 s.

    Raises:
        UserError: the model cannot be had.
    """
    encoder, extractor = _encoder(name)
    count, found = len(sound) // FRAME, []
    if not count:
        raise UserError("a recording has 0.02 s or more")
    for first in range(0, count, _WINDOW):
        part = sound[first * FRAME : (first + _WINDOW) * FRAME]
        part = torch.nn.functional.pad(part, (0, _WINDOW * FRAME - len(part))) / 10
        read = extractor(resampled(part.double().numpy(), RATE, 2 * RATE), sampling_rate=2 * RATE, padding="longest",
                         truncation=False, return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            found.append(encoder(read["input_features"]).last_hidden_state[0])
    return torch.cat(found)[:count]
