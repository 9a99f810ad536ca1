# SPDX-License-Identifier: Apache-2.0
"""Images and recordings as prompts: their files are read, each token is named, and no tokenizer is asked.

A token of an image is a patch, by row and column, behind the class token and the registers, and before the tokens that
detect objects; one of a recording is a frame, by its time. What the decoder of a speech model reads is what it
transcribes itself, greedily.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.audio import read_wave, resampled
from ..errors import UserError
from ..lens import TokenSpans, device_of
from .prompts import Prompt

__all__ = ["Laid", "Signal", "open_image", "read_audio", "read_images"]

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_CLASS = ("cls_token", "class_embedding", "class_token", "distillation_token")  # parameters that are a token
_DETECTS = "detection_tokens"  # one that is several, ``[1, N, D]``, behind the patches
_BEHIND = ("head", "pool", "decoder")  # in the name of a module whose tokens no layer of the encoder sees


@dataclass(frozen=True)
class Signal(Prompt):
    """An image, a recording, or a sentence to translate. ``ids`` are its tokens' numbers, or those of what is said.

    Attributes:
        values: what the model is given, by name, float32 or ids.
        labels: a name for each token.
        words: of the transcript, or those that the tokens of a translation predict, token by token.
        pieces: tokens of a sentence that is translated.
        digest: of the file.
        prefix: tokens before the patches; what is behind them are tokens that detect.
        grid: rows and columns of patches; none for a recording.
        picture: ``[H, W, 3]`` of ``uint8``, the image as the model sees it.
        frames: of the encoder, or tokens of a sentence.
        heard: frames until the recording ends; the rest is silence that fills the window.
        step: seconds of a frame.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    digest: str = ""
    prefix: int = 0
    grid: tuple[int, int] | None = None
    picture: Any = None
    frames: int = 0
    heard: int = 0
    step: float = 0.0

    @property
    def parts(self) -> TokenSpans:
        return Laid(self)

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        return {
            name: x.to(device_of(model), dtype if x.is_floating_point() else None) for name, x in self.values.items()
        }

    def in_frames(self) -> "Signal":
        """This recording with the frames as its tokens, or a sentence as it is before its translation."""
        times = self.pieces or [f"{i * self.step:.2f} s" for i in range(self.frames)]
        return replace(self, ids=list(range(self.frames)), labels=times)


class Laid(TokenSpans):
    """No roles, but which prompt is being read, so that a lens knows how its tokens lie."""

    def __init__(self, signal: Signal) -> None:
        super().__init__()
        self.signal = signal


def open_image(path: Path) -> Any:
    """The image in a file; UserError where it holds none."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no image that can be read ({error}); give a PNG or JPEG") from None


def read_images(paths: Sequence[str | Path], model: nn.Module, processor: Any = None) -> list[Signal]:
    """Images as ``processor`` of transformers prepares them.

    Without one they are resized to the square that the config names and normalised by mean and deviation of ImageNet.

    Raises:
        UserError: no such file, no image, or a model that does not cut images into patches of one size.
    """
    config: Any = model.config
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int | list | tuple):
        raise UserError(f"{type(model).__name__} has no patches of one size, so its tokens have no place in an image")
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    named = {
        name.rpartition(".")[2]: x
        for name, x in model.named_parameters()
        if not any(word in part for part in name.split(".")[:-1] for word in _BEHIND)
    }
    first = [name for name in _CLASS if name in named]
    before = ["class token", "distillation token"][: len(first)]
    before += [f"register {i}" for i in range(int(getattr(config, "num_register_tokens", 0) or 0))]
    after = [f"detection token {i}" for i in range(named[_DETECTS].shape[1] if _DETECTS in named else 0)]
    made = []
    for path in map(Path, paths):
        raw = _bytes(path, "--image")
        values = _prepared(open_image(path), processor, config)
        rows, columns = values.shape[2] // high, values.shape[3] // wide
        labels = [*before, *(f"row {r}, column {c}" for r in range(rows) for c in range(columns)), *after]
        made.append(Signal(
            list(range(len(labels))), path.name, values={"pixel_values": values}, labels=labels, grid=(rows, columns),
            prefix=len(before), picture=_seen(values, processor)[: rows * high, : columns * wide],
            digest=hashlib.sha256(raw).hexdigest(),
        ))  # fmt: skip
    return made


def _bytes(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; {option} takes a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {option} takes a file") from None


def _prepared(image: Any, processor: Any, config: Any) -> Tensor:
    """``[1, 3, H, W]``."""
    if processor is not None:
        try:
            values: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"the image processor refuses it ({error}); check preprocessor_config.json") from None
        if values.ndim != 4:
            raise UserError("the image processor cuts images into pieces of its own, which have no place in an image")
        return values
    size = getattr(config, "image_size", 224)
    high, wide = (size, size) if isinstance(size, int) else size
    pixels = np.asarray(image.resize((wide, high), 3), np.float32) / 255  # 3: bicubic
    return torch.from_numpy(((pixels - _MEAN) / _DEVIATION).astype(np.float32).transpose(2, 0, 1))[None]


def _seen(values: Tensor, processor: Any) -> Any:
    """The image behind ``values [1, 3, H, W]``, ``[H, W, 3]`` of ``uint8``."""
    mean, deviation = _MEAN, _DEVIATION
    if processor is not None:
        normal = bool(getattr(processor, "do_normalize", True))
        mean = processor.image_mean if normal else (0.0,) * 3
        deviation = processor.image_std if normal else (1.0,) * 3
    shown = values[0].permute(1, 2, 0).double().numpy() * np.asarray(deviation) + np.asarray(mean)
    return (np.clip(shown, 0, 1) * 255).round().astype(np.uint8)


def read_audio(paths: Sequence[str | Path], model: Any, extractor: Any, tokenizer: Any) -> list[Signal]:
    """Recordings, PCM in WAV files, and what the model transcribes of each.

    Several channels are averaged; another rate becomes the model's through the Fourier transform of the whole.

    Raises:
        UserError: no such file, no WAV, nothing in it, or more of it than the model hears at once.
    """
    made = []
    frames = int(model.config.max_source_positions)
    for path in map(Path, paths):
        raw = _bytes(path, "--audio")
        sound, rate = read_wave(path)
        seconds = len(sound) / rate
        if not 0 < seconds <= extractor.chunk_length:
            raise UserError(
                f"{path} has {seconds:.1f} s, and the model hears {extractor.chunk_length} s at once: "
                + ("cut it" if seconds else "give a recording")
            )
        sound = resampled(sound, rate, extractor.sampling_rate)
        values = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        signal = Signal([], path.name, values={"input_features": values}, digest=hashlib.sha256(raw).hexdigest())
        with torch.inference_mode():
            said = model.generate(
                **signal.inputs(model), do_sample=False, num_beams=1, return_dict_in_generate=True,
                force_unique_generate_call=True,
            )  # fmt: skip
        ids = said["sequences"][0].tolist()
        words = [tokenizer.decode([i]) for i in ids]
        step = extractor.chunk_length / frames
        made.append(replace(
            signal, ids=ids, labels=words, words=words, frames=frames, step=step,
            heard=min(frames, math.ceil(seconds / step)),
            values={**signal.values, "decoder_input_ids": torch.tensor([ids])},
        ))  # fmt: skip
    return made
