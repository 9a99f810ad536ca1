# SPDX-License-Identifier: Apache-2.0
"""Cepstral coefficients of speech at 8 kHz: MFCC, LFCC and CQCC with deltas, 100 frames a second; and MFCC by 20 ms.

All are the cosine transform (DCT-II, orthonormal) of log energies, of mel filters, of as many linear ones, or of a
constant-Q transform with twelve bins an octave from 62.5 Hz, whose windows are Q periods long.
"""

import math
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._encoder import MELS, RATE, log_mel, mel_filters

__all__ = ["COEFFICIENTS", "Kind", "cepstra", "constant_q", "deltas", "energies", "normalised_mfcc"]

Kind = Literal["mfcc", "lfcc", "cqcc"]
COEFFICIENTS = 20
_WINDOW, _HOP, _FFT = 200, 80, 256  # 25 ms every 10 ms
_LOWEST, _OCTAVE, _BINS = 62.5, 12, 71  # of the constant-Q transform: up to 3.6 kHz
_FLOOR = 1e-4
_REACH = 2  # frames on either side that a delta reads


@cache
def _linear_filters() -> Tensor:
    """Triangles ``[129, 40]``, as far apart in Hz."""
    at, edges = torch.linspace(0, RATE / 2, _FFT // 2 + 1), torch.linspace(0, RATE / 2, MELS + 2)
    rising = (at[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


@cache
def _kernels() -> Tensor:
    """Complex ``[71, longest]``: of each bin a Hann window of Q periods, in the middle, of sum 1."""
    q = 1 / (2 ** (1 / _OCTAVE) - 1)
    longest = math.ceil(q * RATE / _LOWEST)
    found = torch.zeros(_BINS, longest, dtype=torch.complex64)
    for k in range(_BINS):
        rate = _LOWEST * 2 ** (k / _OCTAVE)
        length = round(q * RATE / rate)
        window = torch.hann_window(length, dtype=torch.float64)
        phase = 2 * math.pi * rate / RATE * torch.arange(length, dtype=torch.float64)
        first = (longest - length) // 2
        found[k, first : first + length] = torch.polar(window / window.sum(), -phase).to(torch.complex64)
    return found


def constant_q(sound: Tensor) -> Tensor:
    """Energies of bins at 62.5 Hz times 2^(k / 12): ``[N]`` -> ``[N // 80 + 1, 71]``."""
    kernels = _kernels()
    longest = kernels.shape[1]
    frames = pad(sound, (longest // 2, longest - longest // 2)).unfold(0, longest, _HOP)
    return (frames @ kernels.real.T).square() + (frames @ kernels.imag.T).square()


def energies(sound: Tensor, kind: Kind) -> Tensor:
    """Energies of filters or bins: ``[N]`` -> ``[N // 80 + 1, filters]``."""
    if kind == "cqcc":
        return constant_q(sound)
    spectrum = torch.stft(
        sound, _FFT, _HOP, _WINDOW, torch.hann_window(_WINDOW), return_complex=True, pad_mode="constant"
    )
    return (spectrum.abs().square() / _WINDOW).T @ (mel_filters("htk", None) if kind == "mfcc" else _linear_filters())


@cache
def _cosines(size: int) -> Tensor:
    """``[size, 20]`` of the DCT-II."""
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    found = torch.cos(math.pi * at[:, None] * torch.arange(COEFFICIENTS)) * math.sqrt(2 / size)
    found[:, 0] /= math.sqrt(2)
    return found.float()


def deltas(x: Tensor) -> Tensor:
    """Slope of a regression over two frames on either side, the ends repeated: ``[T, C]`` -> ``[T, C]``."""
    last = len(x) - 1
    at = torch.arange(len(x))
    slope: Any = sum(n * (x[(at + n).clamp(max=last)] - x[(at - n).clamp(min=0)]) for n in range(1, _REACH + 1))
    found: Tensor = slope / (2 * sum(n * n for n in range(1, _REACH + 1)))
    return found


def cepstra(sound: Tensor, kind: Kind) -> Tensor:
    """Coefficients, their deltas, and those of the deltas: float32 ``[N]`` -> ``[N // 80 + 1, 60]``."""
    found = energies(sound, kind).clamp(min=_FLOOR).log()
    found = found @ _cosines(found.shape[1])
    first = deltas(found)
    return torch.cat((found, first, deltas(first)), 1)


def normalised_mfcc(sound: Tensor) -> Tensor:
    """MFCC of :func:`.log_mel`, normalised in each filter, by whole frame of 20 ms: float32 ``[N]`` -> ``[T, 20]``."""
    count = len(sound) // (2 * _HOP)
    frames: Tensor = log_mel(sound)[: 2 * count].unflatten(0, (count, 2)).mean(1)
    return frames @ _cosines(frames.shape[1])
