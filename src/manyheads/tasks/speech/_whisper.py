# SPDX-License-Identifier: Apache-2.0
"""Features of a published speech recogniser, Whisper, frozen.

Its encoder reads 30 seconds, whatever is said. Here it reads a recording, or a window of one, and no more: the same
layers on fewer positions, from the first on, which costs a thirtieth for a second of speech and is not what it was
trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ...data.audio import resampled
from ...data.digits import DIGITS, spelt
from ...errors import UserError

__all__ = ["WHISPER", "WIDTH", "digits_of", "encoder_features", "hypotheses", "states", "whisper", "windowed"]

WHISPER, WIDTH = "whisper-tiny.en", 384
_RATE, _FRAME = 16_000, 320  # samples a second that it reads, and samples of a frame of what it says
_LOUD = 0.1  # deviation of a recording that it is given
_AT_ONCE = 64
_WINDOW = 4  # seconds of a window

_kept: dict[bytes, Tensor] = {}


@cache
def whisper() -> tuple[Any, Any, Any]:
    """Model, feature extractor and tokenizer, on a GPU where there is one.

    Raises:
        UserError: they cannot be had.
    """
    from ...models import load_speech

    return load_speech(WHISPER, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def encoder_features(sounds: Sequence[Tensor], rate: int) -> list[Tensor]:
    """Last hidden states of the encoder for recordings of one length, each ``[T, 384]`` float32, 50 frames a second.

    They are made once for every recording and kept, in 16 bits.

    Args:
        sounds: float32 ``[N]`` each, of variance about 1.
        rate: samples a second.
    """
    return [x.float() for x in _once(_kept, sounds, _AT_ONCE, lambda some: _encoded(_heard(some, rate)).half())]


def _once(kept: dict[bytes, Any], sounds: Sequence[Tensor], at_once: int, made: Callable[..., Any]) -> list[Any]:
    """What is kept of each sound; what is not there is ``made``, of as many sounds at once."""
    keys = [hashlib.sha1(sound.numpy().tobytes(), usedforsecurity=False).digest() for sound in sounds]
    missing = list({key: sound for key, sound in zip(keys, sounds, strict=True) if key not in kept}.items())
    for first in range(0, len(missing), at_once):
        some = dict(missing[first : first + at_once])
        kept.update(zip(some, made(list(some.values())), strict=True))
    return [kept[key] for key in keys]


def windowed(sound: Tensor, rate: int) -> Tensor:
    """Last hidden states of the encoder by whole frame of 20 ms, float32 ``[T, 384]``; it reads windows of 4 s.

    Args:
        sound: float32 ``[N]``, of variance about 1.
        rate: samples a second.

    Raises:
        UserError: the model cannot be had, or there is no whole frame.
    """
    count, size = len(sound) * _RATE // (_FRAME * rate), _WINDOW * rate
    if not count:
        raise UserError("a recording has 0.02 s or more")
    parts = [torch.nn.functional.pad(part, (0, size - len(part))) for part in sound.split(size)]
    heard = [resampled((part / (1 / _LOUD)).double().numpy(), rate, _RATE) for part in parts]
    return torch.cat([_encoded([one])[0] for one in heard])[:count]


def _heard(sounds: Sequence[Tensor], rate: int) -> list[Any]:
    return [_LOUD * resampled(sound.numpy(), rate, _RATE) for sound in sounds]


@torch.no_grad()
def _encoded(heard: Sequence[Any]) -> Tensor:
    """``[B, T, 384]`` on the CPU, of recordings as the model reads them, float32 ``[N]``."""
    model, extractor, _ = whisper()
    length = -(-max(map(len, heard)) // _FRAME) * _FRAME
    mel = extractor(
        heard, sampling_rate=_RATE, return_tensors="pt", padding="max_length", max_length=length, truncation=True
    )["input_features"]
    found: Tensor = states(model.get_encoder(), mel.to(model.device)).cpu()
    return found


def states(encoder: Any, mel: Tensor, mask: Tensor | None = None) -> Tensor:
    """What Whisper's encoder makes of fewer frames than 3,000, ``[B, 80, T]`` -> ``[B, T / 2, dim]``.

    Where ``mask [B, T]`` is False is padding, of zeros, which does not reach what stands before it.
    """
    x = torch.nn.functional.gelu(encoder.conv1(mel))
    x = torch.nn.functional.gelu(encoder.conv2(x if mask is None else x * mask[:, None])).mT
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    x = torch.nn.functional.dropout(x, encoder.dropout, encoder.training)
    seen = None if mask is None else mask[:, None, None, ::2].expand(-1, 1, x.shape[1], -1)
    for layer in encoder.layers:
        out = layer(x, attention_mask=seen)
        x = out[0] if isinstance(out, tuple) else out
    found: Tensor = encoder.layer_norm(x)
    return found


_said: dict[bytes, str] = {}


def hypotheses(sounds: Sequence[Tensor], rate: int) -> list[str]:
    """What Whisper says of recordings, greedily, of which digits alone are kept: ``"3 1 4"``."""
    model, _, tokenizer = whisper()

    def made(some: Sequence[Tensor]) -> list[str]:
        whole = [torch.nn.functional.pad(sound, (0, 30 * rate - len(sound))) for sound in some]  # as it was trained
        states = BaseModelOutput(last_hidden_state=_encoded(_heard(whole, rate)).to(model.device))
        with torch.no_grad():
            ids = model.generate(encoder_outputs=states, do_sample=False, num_beams=1, max_new_tokens=24)
        return [digits_of(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]

    return _once(_said, sounds, _AT_ONCE // 8, made)


def digits_of(text: str) -> str:
    """Digits of a transcript, as figures or by name, others left away."""
    return " ".join(str(DIGITS.index(word)) for word in re.findall(r"[a-z]+", spelt(text)) if word in DIGITS)
