# SPDX-License-Identifier: Apache-2.0
"""Recordings of the user's: PCM in WAV files, and another rate of samples."""

import wave
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

__all__ = ["read_recording", "read_wave", "resampled"]


def read_wave(path: Path) -> tuple[Any, int]:
    """Samples of one channel, float64 ``[N]`` from -1 to 1, and how many a second.

    Raises:
        UserError: no such file, or none of PCM samples.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError, OSError) as error:
        why = str(error) or "it ends too early"
        raise UserError(f"{path} is no WAV file of PCM samples ({why}); convert it to one") from None
    raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, width)
    if width == 1:
        sound = raw[:, 0].astype(np.float64) / 128 - 1
    else:  # the highest bytes of 32 bits
        whole = np.zeros((len(raw), 4), np.uint8)
        whole[:, 4 - width :] = raw
        sound = whole.view("<i4")[:, 0].astype(np.float64) / 2**31
    return sound.reshape(-1, channels).mean(1), rate


def read_recording(path: Path, rate: int, longest: float) -> Any:
    """A recording of one's own at ``rate`` samples a second, float32 ``[N]``.

    Raises:
        UserError: it is no WAV file, is empty, or has more than ``longest`` seconds.
    """
    sound, own = read_wave(path)
    if not 0 < len(sound) / own <= longest:
        raise UserError(f"{path} has {len(sound) / own:.1f} s; recordings have more than 0 and at most {longest:g} s")
    return resampled(sound, own, rate)


def resampled(sound: Any, rate: int, wanted: int) -> Any:
    """``sound`` at ``wanted`` samples a second: frequencies above what both rates carry are left out."""
    if rate == wanted:
        return sound.astype(np.float32)
    count = max(1, round(len(sound) * wanted / rate))
    spectrum = np.fft.rfft(sound)
    return (np.fft.irfft(spectrum[: count // 2 + 1], count) * (count / len(sound))).astype(np.float32)
