# SPDX-License-Identifier: Apache-2.0
"""Streams of spoken words between silences, in noise, with exact labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._encoder import RATE

__all__ = ["FRAME", "NOISES", "mixed", "stream"]

FRAME = 160  # samples of a frame of 20 ms, Whisper's
_QUIET = 35.0  # dB below the loudest frame of a recording: its ends that are quieter are no speech
_SILENCE = (0.1, 1.2)  # seconds between words
_VOICES = 6  # of a babble


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
