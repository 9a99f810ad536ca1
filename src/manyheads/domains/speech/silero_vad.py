# SPDX-License-Identifier: Apache-2.0
"""silero-vad (MIT), a published voice activity detector of the library of that name, as it is: nothing is trained.

It gives a probability for each 256 samples at 8 kHz; a frame of 20 ms has that of the chunk that holds its middle.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import UserError
from ...recipe import FieldTask, Procedure

__all__ = ["SileroVad"]

_RATE, _CHUNK, _FRAME = 8000, 256, 160
_LOUDEST = 0.5  # that a recording is brought to


@cache
def _model() -> Any:
    try:
        return import_module("silero_vad").load_silero_vad()
    except ImportError as error:
        raise UserError("silero_vad needs the library of that name: pip install --no-deps silero-vad") from error


@dataclass(frozen=True, kw_only=True)
class SileroVad(Procedure):
    """silero-vad on the recordings that trained detectors are judged on."""

    task: ClassVar[str] = "voice_activity"

    def run(self, task: FieldTask, rng: np.random.Generator) -> Iterable[tuple[str, str, float]]:
        judging: Any = task
        for sample in judging.judged("test"):
            said = judging.truth(sample).__class__(self.speech(sample.inputs))
            for metric, value in judging.score(sample, said).items():
                yield metric, sample.name, value

    def speech(self, sound: torch.Tensor) -> torch.Tensor:
        """Probabilities by frame of 20 ms ``[N / 160]`` of samples ``[N]`` at 8 kHz.

        Raises:
            UserError: the library is not installed.
        """
        model = _model()
        loud = sound * (_LOUDEST / sound.abs().max().clamp(min=1e-6))
        with torch.no_grad():
            chunks = model.audio_forward(loud[None], sr=_RATE)[0]
        middle = torch.arange(len(sound) // _FRAME) * _FRAME + _FRAME // 2
        found: torch.Tensor = chunks[(middle // _CHUNK).clamp(max=len(chunks) - 1)].clone()
        return found
