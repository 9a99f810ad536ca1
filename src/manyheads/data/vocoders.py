# SPDX-License-Identifier: Apache-2.0
"""Classic vocoders: a recording is analysed, most of it thrown away, and made again; what comes out is fake speech.

Each takes float64 ``[N]`` at 8 kHz and random draws, and gives ``[N]``. All keep what is said and about when:

``griffin_lim``  magnitudes of 40 mel filters, turned back to a spectrum by least squares; phases by Griffin and Lim's
                 iteration (IEEE ASSP 32, 1984)
``lpc``          an all-pole filter of order 12 a frame, driven by pulses at the pitch or by noise
                 (Atal and Hanauer, 1971)
``phase``        the magnitudes of the spectrum themselves, with random phases
``harmonic``     harmonics of a smooth pitch under a cepstrally smoothed envelope, noise above 2.5 kHz or without voice:
                 source and filter in the manner of WORLD (Morise et al., 2016), of which it is no port
``sinusoidal``   the strongest twelve peaks of each spectrum as tones (McAulay and Quatieri, IEEE ASSP 34, 1986), phases
                 advanced from frame to frame
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

__all__ = ["RATE", "VOCODERS", "pitch"]

RATE = 8000
_FFT, _HOP = 256, 64
_WINDOW = np.hanning(_FFT + 1)[:-1]
_MELS, _ITERATIONS = 40, 16
_ORDER, _FLATTEN = 12, 1e-4  # of the all-pole filter; of the energy that is added to its diagonal
_CEPSTRUM = 24  # coefficients of a smooth envelope
_PEAKS = 12
_LOWEST, _HIGHEST, _VOICED = 70, 350, 0.45  # Hz of a pitch; autocorrelation from which a frame has one
_NOISY = 2500.0  # Hz from which voiced speech is noise

Array = Any


def _frames(sound: Array) -> Array:
    """``[F, 256]``, every 64 samples, the first and last centred on the ends."""
    padded = np.pad(sound, _FFT // 2 + _HOP)
    count = 1 + (len(padded) - _FFT) // _HOP
    return padded[_HOP * np.arange(count)[:, None] + np.arange(_FFT)]


def _added(frames: Array, length: int) -> Array:
    """Frames windowed, added where they overlap, and weighed so that untouched frames give back the sound."""
    count, parts = len(frames), _FFT // _HOP
    total, weight = np.zeros((count + parts - 1, _HOP)), np.zeros((count + parts - 1, _HOP))
    for part in range(parts):
        own = slice(part * _HOP, (part + 1) * _HOP)
        total[part : part + count] += (frames * _WINDOW)[:, own]
        weight[part : part + count] += _WINDOW[own] ** 2
    start = _FFT // 2 + _HOP
    return (total / np.maximum(weight, 1e-3)).ravel()[start : start + length]


def _spectra(sound: Array) -> Array:
    return np.fft.rfft(_frames(sound) * _WINDOW, axis=1)


def _back(spectra: Array, length: int) -> Array:
    return _added(np.fft.irfft(spectra, _FFT, axis=1), length)


@cache
def _through_mel() -> Array:
    """``[129, 129]``: to the energies of mel filters and back, by least squares."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(_FFT // 2 + 1, _MELS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return filters @ np.linalg.pinv(filters)


def _griffin_lim(sound: Array, rng: np.random.Generator) -> Array:
    magnitudes = np.maximum(np.abs(_spectra(sound)) @ _through_mel(), 0)
    made = magnitudes * np.exp(2j * np.pi * rng.random(magnitudes.shape))
    for _ in range(_ITERATIONS):
        again = _spectra(_back(made, len(sound)))
        made = magnitudes * again / np.maximum(np.abs(again), 1e-9)
    return _back(made, len(sound))


def _phase(sound: Array, rng: np.random.Generator) -> Array:
    spectra = _spectra(sound)
    return _back(np.abs(spectra) * np.exp(2j * np.pi * rng.random(spectra.shape)), len(sound))


def pitch(sound: Array) -> tuple[Array, Array]:
    """Pitch in Hz ``[F]`` by the highest autocorrelation, made smooth over five frames, and whether there is voice."""
    frames = _frames(sound)
    frames = frames - frames.mean(1, keepdims=True)
    power = np.abs(np.fft.rfft(frames * _WINDOW, 2 * _FFT, axis=1)) ** 2
    own = np.fft.irfft(np.abs(np.fft.rfft(_WINDOW, 2 * _FFT)) ** 2)  # a window's, which would favour short lags
    correlation = np.fft.irfft(power, axis=1)[:, : _FFT // 2] / own[: _FFT // 2]
    lags = np.arange(RATE // _HIGHEST, RATE // _LOWEST + 1)  # less than half a frame: it holds two periods
    found = correlation[:, lags] / np.maximum(correlation[:, :1], 1e-9)
    voiced = (found.max(1) > _VOICED) & (correlation[:, 0] > 0.05 * correlation[:, 0].max())
    rates = RATE / lags[found.argmax(1)]
    near = np.pad(rates, 2, mode="edge")[np.arange(len(rates))[:, None] + np.arange(5)]
    return np.median(near, 1), voiced


def _by_sample(values: Array, length: int) -> Array:
    """A value a frame ``[F]``, drawn out linearly to ``[N]``."""
    at = (np.arange(length) + _HOP) / _HOP
    return np.interp(at, np.arange(len(values)), values)


def _filtered(source: Array, envelopes: Array, length: int) -> Array:
    """A source ``[N]`` whose spectrum is multiplied by an envelope ``[F, 129]`` in every frame."""
    return _back(_spectra(source) * envelopes, length)


def _lpc(sound: Array, rng: np.random.Generator) -> Array:
    frames = _frames(sound) * _WINDOW
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * _FFT, axis=1)) ** 2, axis=1)[:, : _ORDER + 1]
    correlation[:, 0] = correlation[:, 0] * (1 + _FLATTEN) + 1e-9
    at = np.abs(np.arange(_ORDER)[:, None] - np.arange(_ORDER))
    weights = np.linalg.solve(correlation[:, at], correlation[:, 1:, None])[..., 0]
    gains = np.sqrt(np.maximum(correlation[:, 0] - (weights * correlation[:, 1:]).sum(1), 1e-12))
    poles = np.fft.rfft(np.concatenate((np.ones((len(weights), 1)), -weights), 1), _FFT, axis=1)
    rates, voiced = pitch(sound)
    cycles = np.cumsum(_by_sample(rates, len(sound)) / RATE)
    pulses = np.diff(np.floor(cycles), prepend=0) * np.sqrt(RATE / _by_sample(rates, len(sound)))
    source = np.where(_by_sample(voiced, len(sound)) > 0.5, pulses, rng.standard_normal(len(sound)))
    return _filtered(source, (gains / np.sqrt((_WINDOW**2).sum()))[:, None] / poles, len(sound))


def _harmonic(sound: Array, rng: np.random.Generator) -> Array:
    logs = np.log(np.maximum(np.abs(_spectra(sound)), 1e-4))
    cepstra = np.fft.irfft(logs, axis=1)
    cepstra[:, _CEPSTRUM : _FFT - _CEPSTRUM + 1] = 0
    envelopes = np.exp(np.fft.rfft(cepstra, axis=1).real) / np.sqrt((_WINDOW**2).sum())
    rates, voiced = pitch(sound)
    by_sample, loud = _by_sample(rates, len(sound)), _by_sample(voiced, len(sound))
    turns, tones = 2 * np.pi * np.cumsum(by_sample) / RATE, np.zeros(len(sound))
    for k in range(1, int(_NOISY // _LOWEST) + 1):
        tones += np.where(k * by_sample < _NOISY, np.sqrt(2) * np.cos(k * turns), 0)
    noise = rng.standard_normal(len(sound))
    spectrum = np.fft.rfft(noise)
    spectrum[np.fft.rfftfreq(len(noise), 1 / RATE) < _NOISY] = 0
    high = np.fft.irfft(spectrum, len(noise))
    tones *= np.sqrt(by_sample / RATE * 2)  # as much energy a hertz as white noise has
    return _filtered(loud * (tones + high) + (1 - loud) * noise, envelopes, len(sound))


def _sinusoidal(sound: Array, rng: np.random.Generator) -> Array:
    magnitudes = np.abs(_spectra(sound))
    inner = magnitudes[:, 1:-1]
    peaks = np.where((inner >= magnitudes[:, :-2]) & (inner > magnitudes[:, 2:]), inner, 0)
    least = np.sort(peaks, 1)[:, -_PEAKS, None]
    kept = np.pad(np.where(peaks >= np.maximum(least, 1e-9), peaks, 0), ((0, 0), (1, 1)))
    turns = 2 * np.pi * np.arange(_FFT // 2 + 1) * _HOP / _FFT
    phases = 2 * np.pi * rng.random(_FFT // 2 + 1) + turns * np.arange(len(kept))[:, None]
    frames = np.fft.irfft(kept * np.exp(1j * phases), _FFT, axis=1)
    return _added(frames * _WINDOW, len(sound))


VOCODERS: Mapping[str, Callable[[Array, np.random.Generator], Array]] = {
    "griffin_lim": _griffin_lim, "lpc": _lpc, "phase": _phase, "harmonic": _harmonic, "sinusoidal": _sinusoidal,
}  # fmt: skip
