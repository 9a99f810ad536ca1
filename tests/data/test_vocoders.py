# SPDX-License-Identifier: Apache-2.0
"""Vocoders: what each keeps of a sound, what it throws away, and the pitch that two of them are driven by."""

import numpy as np
import pytest

from manyheads.data.vocoders import RATE, VOCODERS, _back, _spectra, pitch


def vowel(rate=120.0, seconds=0.6):
    """Harmonics under two resonances."""
    at = np.arange(int(seconds * RATE)) / RATE
    tones = [np.exp(-(((k * rate - 700) / 300) ** 2)) + 0.3 * np.exp(-(((k * rate - 1800) / 300) ** 2))
             for k in range(1, 30)]  # fmt: skip
    sound = sum(a * np.cos(2 * np.pi * (k + 1) * rate * at + k) for k, a in enumerate(tones))
    return sound / sound.std()


def envelope(sound):
    """Mean log energies in bands of 250 Hz."""
    power = (np.abs(_spectra(sound)) ** 2).mean(0)[:-1].reshape(-1, 8).sum(1)
    return np.log(power / power.sum() + 1e-3)


def test_untouched_spectra_give_the_sound_back():
    sound = np.random.default_rng(0).standard_normal(1234)
    assert np.abs(_back(_spectra(sound), 1234) - sound).max() < 1e-12
    assert np.abs(_back(np.abs(_spectra(sound)), 1234) - sound).max() > 0.1  # control: phases matter


@pytest.mark.parametrize("name", VOCODERS)
def test_a_fake_has_the_length_and_the_envelope_but_not_the_waveform(name):
    sound = vowel()
    made = VOCODERS[name](sound, np.random.default_rng(0))
    assert made.shape == sound.shape and np.isfinite(made).all()
    assert np.corrcoef(envelope(sound), envelope(made))[0, 1] > 0.8
    other = VOCODERS[name](sound[::-1] * np.linspace(-1, 1, len(sound)), np.random.default_rng(0))
    assert np.abs(made - other).max() > 1e-3  # the sound decides
    assert abs(np.corrcoef(sound, made)[0, 1]) < 0.9
    again = VOCODERS[name](sound, np.random.default_rng(0))
    assert np.array_equal(made, again)
    assert np.isfinite(VOCODERS[name](np.zeros(500), np.random.default_rng(0))).all()


@pytest.mark.parametrize("rate", [90.0, 120.0, 210.0])
def test_the_pitch_is_found(rate):
    rates, voiced = pitch(vowel(rate))
    inner = slice(4, -4)
    assert voiced[inner].all() and np.abs(rates[inner] / rate - 1).max() < 0.03
    _, voiced = pitch(np.random.default_rng(0).standard_normal(5000))
    assert voiced.mean() < 0.2  # noise has none


def test_a_sinusoidal_fake_has_twelve_peaks_a_frame():
    noise = np.random.default_rng(0).standard_normal(4000)
    share = []
    for sound in (VOCODERS["sinusoidal"](noise, np.random.default_rng(1)), noise):
        power = np.sort(np.abs(_spectra(sound)) ** 2, 1)[:, ::-1]
        share.append((power[:, :48].sum(1) / power.sum(1)).mean())  # a peak is four bins wide
    assert share[0] > share[1] and share[0] > 0.9
