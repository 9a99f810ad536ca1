# SPDX-License-Identifier: Apache-2.0
"""What is to be made: the rows of a grid, from prompts, classes and seeds as they are given."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from ..catalog import nearest
from ..errors import UserError
from ..models.pipeline import parameters

__all__ = ["Row", "filled", "from_image", "read_size", "rows_of", "shown"]

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Row:
    """One image to make: by a prompt, from a source to a target prompt, of a class, or of anything.

    Attributes:
        seed: of the noise.
        prompt: text, if the pipeline takes it.
        source: text of the image that is made beside, from the same noise.
        number: class, if the pipeline takes one.
        label: what was asked for, for people.
        image: file of the image that is the source, whose text is empty then.
        noise: what it starts from, where that is not the seed's.
    """

    seed: int
    prompt: str | None = None
    source: str | None = None
    number: int | None = None
    label: str = ""
    image: str | None = None
    noise: Tensor | None = field(default=None, compare=False, repr=False)


def read_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from ``512x768``."""
    if text is None:
        return None
    high, _, wide = text.lower().partition("x")
    if not high.isdecimal() or not wide.isdecimal() or not int(high) or not int(wide):
        raise UserError(f"{text!r} is no size; write height x width, as --size 512x768")
    return int(high), int(wide)


def rows_of(
    pipe: Any, prompts: Sequence[str], classes: Sequence[str], source: str | None, seeds: Sequence[int]
) -> list[Row]:  # fmt: skip
    """A row for each prompt or class, and each seed.

    A pipeline with a vocabulary gets two prompts of its words where none are given.

    Raises:
        UserError: the pipeline takes another kind of condition, or does not know a word or class.
    """
    takes = parameters(pipe)
    for option, name, given in (("--prompt", "prompt", prompts), ("--class", "class_labels", classes)):
        if given and name not in takes:
            other = {"prompt": "--prompt", "class_labels": "--class"}
            hint = next((f"give {how}" for known, how in other.items() if known in takes), "it makes anything")
            raise UserError(f"{type(pipe).__name__} takes no {option}; {hint}")
    if "prompt" in takes:
        prompts = list(prompts) or _defaults(pipe)
        if not prompts:
            raise UserError(f"{type(pipe).__name__} is conditioned on text; give --prompt")
        for text in [*prompts, *([source] if source is not None else [])]:
            if hasattr(pipe, "words"):
                pipe.words(text)
        before = f"{source} \u2192 " if source is not None else ""
        return [Row(s, text, source, label=_label(before + text, s, seeds)) for text in prompts for s in seeds]
    if source is not None:
        raise UserError(f"{type(pipe).__name__} takes no prompt, so it has no --source")
    if "class_labels" in takes:
        if not classes:
            raise UserError(f"{type(pipe).__name__} is conditioned on a class; give --class with its number or label")
        numbers = [(name, _class(pipe, name)) for name in classes]
        return [Row(s, number=n, label=_label(f"class {name}", s, seeds)) for name, n in numbers for s in seeds]
    return [Row(s, label=_label("", s, seeds)) for s in seeds]


def from_image(
    pipe: Any, path: Path, rows: Sequence[Row], steps: int | None, caption: str = ""
) -> tuple[list[Row], Tensor]:  # fmt: skip
    """Rows without a source, made beside an image or video: they start from the noise that it would have come from.

    Args:
        pipe: a pipeline that inverts its steps.
        path: of the image or video.
        rows: targets.
        steps: that will be made; the pipeline's own number if None.
        caption: what it shows; it is inverted without one where empty.

    Returns:
        the rows, and the latents ``[T + 1, 1, ...]`` from the noise to the source.

    Raises:
        UserError: the pipeline cannot, the file is no image, or the rows differ by their seeds.
    """
    if not hasattr(pipe, "path"):
        raise UserError(
            f"{type(pipe).__name__} is not inverted by this command; in Python, manyheads.diffusion.masactrl.invert "
            "does it, or give --source a text"
        )
    if len({row.seed for row in rows}) > 1:
        raise UserError("an image has its own noise, which no seed changes; give --source IMAGE one seed")
    if caption and hasattr(pipe, "words"):
        pipe.words(caption)
    try:
        with Image.open(path) as image:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except UnidentifiedImageError:
        raise UserError(f"{path} is no image; give --source a text, or a png, jpg, gif or webp") from None
    latents = pipe.encode_frames(frames if len(frames) > 1 else frames[0])
    found = pipe.path(latents, *([] if steps is None else [steps]), prompt=caption)
    label = f"{path.name} \u2192 "
    return [
        replace(row, source=caption, image=str(path), noise=found[0], label=label + row.label) for row in rows
    ], found


def filled(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Rows that say of which image they fill the hole."""
    return [replace(row, image=str(path), label=f"{path.name}: {row.label}") for row in rows]


def shown(path: Path, shape: Sequence[int]) -> Array:
    """An image file, or as many frames of a video's, float32 in 0..1, in the size of what was made ``[F, H, W, 3]``."""
    count, high, wide, _ = shape
    with Image.open(path) as image:
        frames = [frame.convert("RGB").resize((wide, high)) for frame in ImageSequence.Iterator(image)]
    chosen = [np.asarray(frames[i * len(frames) // count], dtype=np.float32) for i in range(count)]
    return np.divide(np.stack(chosen), 255, dtype=np.float32)


def _label(text: str, seed: int, seeds: Sequence[int]) -> str:
    return f"{text}\nseed {seed}".strip() if len(seeds) > 1 else text


def _defaults(pipe: Any) -> list[str]:
    words = getattr(pipe, "vocabulary", None)
    return [" ".join(known[i] for known in words.values()) for i in (0, 1)] if words else []


def _class(pipe: Any, given: str) -> int:
    known = {str(label).lower(): int(number) for label, number in (getattr(pipe, "labels", None) or {}).items()}
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    count = getattr(config, "num_embeds_ada_norm", None)
    if given.isdecimal():
        if count is not None and int(given) >= count:
            raise UserError(f"there is no class {given}; the model has classes 0 to {count - 1}")
        return int(given)
    if given.lower() in known:
        return known[given.lower()]
    close = nearest(given, list(known))
    hint = f"did you mean {close[0]!r}?" if close else "give its number or label" if known else "give its number"
    raise UserError(f"there is no class {given!r}; {hint}")
