# SPDX-License-Identifier: Apache-2.0
"""WAV files of tones: three speakers, each digit at a pitch of its own."""

import wave

import numpy as np
import pytest


def write(path, rate=16000, pitch=440.0, seconds=0.3):
    samples = 8000 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of four digits, twice by each speaker."""
    place = tmp_path_factory.mktemp("digits")
    for speaker in ("ann", "bob", "cid"):
        for digit in range(4):
            for n in range(2):
                write(place / f"{digit}_{speaker}_{n}.wav", pitch=300 + 200 * digit + 7 * n)
    return place
