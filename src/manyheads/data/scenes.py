# SPDX-License-Identifier: Apache-2.0
"""Small pictures and films whose content is known exactly: an emoji at a place, or on its way, before a photograph.

A scene is a CIFAR-10 photograph of 32 x 32 pixels with an emoji of 14 pixels in one of its quarters. A film has 8
frames of 16 x 16 pixels: a window moves over a photograph, and an emoji of 8 pixels moves the same way through the
window. Both are put together as they are drawn, so that no sample is seen twice, and what is where is known for each:
object, place or direction, backdrop, and the object's alpha mask.

A caption is three words, one of each kind; a word may be missing. Photographs are CIFAR-10 (for research), emoji are
Noto (Apache-2.0); see ``files.toml``.
"""

import io
import re
import zipfile
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from ..errors import UserError
from . import files

__all__ = [
    "BACKDROPS", "DIRECTIONS", "OBJECTS", "PLACES", "VOCABULARY", "WORDS", "Kind", "Sample", "available", "draw",
    "new_object", "photographs", "read_caption", "sprites",
]  # fmt: skip

Kind = Literal["scenes", "moving"]
Split = Literal["train", "test"]

_CODES = {
    "apple": "1f34e", "sunflower": "1f33b", "heart": "1f499", "fire": "1f525", "ghost": "1f47b", "octopus": "1f419",
    "tree": "1f333", "ball": "26bd",
}  # fmt: skip
OBJECTS = tuple(_CODES)
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("to the right", "to the left", "down", "up")
BACKDROPS = ("airplane", "frog", "horse", "ship")
VOCABULARY: dict[Kind, dict[str, tuple[str, ...]]] = {
    "scenes": {"object": OBJECTS, "place": PLACES, "backdrop": BACKDROPS},
    "moving": {"object": OBJECTS, "direction": DIRECTIONS, "backdrop": BACKDROPS},
}
WORDS = ("", *OBJECTS, *PLACES, *DIRECTIONS, *BACKDROPS)  # a word's place here is its token; 0 is a missing word

SIDE, OBJECT = 32, 14  # pixels of a scene and of its object
FRAMES, WINDOW, MOVER = 8, 16, 8  # frames of a film, pixels of its window and of its object
_STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # rows and columns a frame, by direction


@dataclass(frozen=True, slots=True)
class Sample:
    """Scenes or films.

    Attributes:
        images: float32 in -1..1, ``[N, 3, H, W]``, or ``[N, 3, F, H, W]`` for films.
        labels: int64 ``[N, 3]``, which word of each kind.
        alpha: how much the object covers, float32 ``[N, 1, H, W]`` or ``[N, 1, F, H, W]``, 0 to 1.
        photographs: behind the objects of scenes, as the images; None for films.
    """

    images: Tensor
    labels: Tensor
    alpha: Tensor
    photographs: Tensor | None = None

    def tokens(self, kind: Kind) -> Tensor:
        """Captions, int64 ``[N, 3]``."""
        return tokens(self.labels, kind)


def tokens(labels: Tensor, kind: Kind) -> Tensor:
    """The captions, int64 ``[N, 3]``, that say ``labels [N, 3]``."""
    starts = [WORDS.index(words[0]) for words in VOCABULARY[kind].values()]
    return labels + torch.tensor(starts, device=labels.device)


def read_caption(text: str, kind: Kind) -> list[int]:
    """The three tokens that a caption in plain words says, 0 for a kind of word that is missing.

    Raises:
        UserError: a word that is not known, or two of one kind.
    """
    rest, found = f" {text.lower()} ", []
    for name, words in VOCABULARY[kind].items():
        said = [word for word in words if re.search(rf"\b{word}\b", rest)]
        if len(said) > 1:
            raise UserError(f"{text!r}: say one {name}, not {' and '.join(said)}")
        for word in said:
            rest = re.sub(rf"\b{word}\b", " ", rest)
        found.append(WORDS.index(said[0]) if said else 0)
    unknown = [word for word in re.findall(r"[^\W_]+", rest) if word not in _FILLERS]
    if unknown:
        known = "; ".join(f"{name}: {', '.join(words)}" for name, words in VOCABULARY[kind].items())
        raise UserError(f"{text!r}: {unknown[0]!r} is not known to this model, it knows {known}")
    return found


_FILLERS = frozenset("a an the at in on of over before with and moving picture photo image background".split())


def available() -> bool:
    """Whether photographs and emoji are on this machine, so that nothing has to be downloaded."""
    stock = files.local("cifar10-25k") or files.local("cifar10-images")
    return bool(stock) and (
        files.local("noto-emoji-32") is not None or all(files.local(f"emoji-{name}") for name in OBJECTS)
    )


@cache
def sprites(size: int) -> Tensor:
    """The objects, premultiplied RGB in 0..1 and alpha: float32 ``[8, 4, size, size]``."""
    packed = files.local("noto-emoji-32")
    if packed is not None:
        with zipfile.ZipFile(packed) as archive:
            data = [archive.read(f"emoji_u{code}.png") for code in _CODES.values()]
    else:
        data = [files.path(f"emoji-{name}").read_bytes() for name in OBJECTS]
    return torch.stack([_sprite(each, size) for each in data])


def new_object(code: str) -> Tensor:
    """An emoji by its code point, as ``1f680``, in the size of an object of a scene: as :func:`sprites`, ``[4, s, s]``.

    Raises:
        UserError: there is none.
    """
    with zipfile.ZipFile(files.path("noto-emoji-32")) as archive:
        if f"emoji_u{code}.png" not in archive.namelist():
            raise UserError(f"there is no emoji {code}: give a code point in hexadecimal, as 1f680 for a rocket")
        return _sprite(archive.read(f"emoji_u{code}.png"), OBJECT)


def _sprite(data: bytes, size: int) -> Tensor:
    raw = _pixels(data, "RGBA").float().movedim(-1, 0) / 255
    raw[:3] *= raw[3:]
    return interpolate(raw[None], size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


@cache
def photographs(split: Split) -> list[Tensor]:
    """The photographs of each backdrop, uint8 ``[N, 3, 32, 32]``."""
    path = files.local("cifar10-25k") or files.path("cifar10-images")
    found = []
    with zipfile.ZipFile(path) as archive:
        for backdrop in BACKDROPS:
            names = sorted(n for n in archive.namelist() if f"{split}/{backdrop}/" in n and n.endswith(".jpg"))
            found.append(torch.stack([_pixels(archive.read(name), "RGB") for name in names]).movedim(-1, 1))
    return found


def _pixels(data: bytes, mode: str) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert(mode)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, -1)


def draw(
    kind: Kind, count: int, generator: Generator, split: Split = "train", device: str = "cpu",
    sprite: Tensor | None = None, **fixed: int,
) -> Sample:  # fmt: skip
    """Draw scenes or films.

    Args:
        kind: ``scenes`` or ``moving``.
        count: N.
        generator: on the CPU.
        split: of the photographs.
        device: where the result lies.
        sprite: what stands in scenes for the object, whatever its label, see :func:`new_object`.
        fixed: labels that are not drawn, as ``object=3``.
    """
    kinds = VOCABULARY[kind]
    labels = torch.stack([torch.randint(len(words), (count,), generator=generator) for words in kinds.values()], 1)
    for i, name in enumerate(kinds):
        if name in fixed:
            labels[:, i] = fixed[name]
    sizes = torch.tensor([len(p) for p in photographs(split)])
    random = torch.rand(4, count, generator=generator)
    which = (sizes.cumsum(0) - sizes)[labels[:, 2]] + (random[0] * sizes[labels[:, 2]]).long()
    labels, random = labels.to(device), random.to(device)
    back = _stock(split, device)[which.to(device)]
    back = torch.where(random[1][:, None, None, None] < 0.5, back, back.flip(-1)).float() / 255
    if kind == "scenes":
        images, alpha = _scene(back, labels, random[2:], sprite)
    else:
        images, alpha = _film(back, labels, random[2:])
    return Sample(images * 2 - 1, labels, alpha, back * 2 - 1 if kind == "scenes" else None)


@cache
def _stock(split: Split, device: str) -> Tensor:
    """All photographs, one after the other, where samples are put together."""
    return torch.cat(photographs(split)).to(device)


def _scene(back: Tensor, labels: Tensor, random: Tensor, sprite: Tensor | None) -> tuple[Tensor, Tensor]:
    """The object in its quarter, up to two pixels from where the quarter begins."""
    slack = SIDE // 2 - OBJECT + 1
    corner = torch.stack([labels[:, 1] // 2, labels[:, 1] % 2], 1) * (SIDE // 2)
    at = corner + (random.T * slack).long()
    shown = sprites(OBJECT)[labels[:, 0].cpu()] if sprite is None else sprite.expand(len(labels), -1, -1, -1)
    cover = _placed(shown.to(labels.device), at, SIDE)
    return cover[:, :3] + (1 - cover[:, 3:]) * back, cover[:, 3:]


def _film(back: Tensor, labels: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Frames ``[N, 3, F, h, w]``: object and window move one pixel a frame in the same direction."""
    step = torch.tensor(_STEPS, device=labels.device)[labels[:, 1]]  # [N, 2]
    room = WINDOW - MOVER
    start = (random.T * (room + 1)).long()
    start = torch.where(step > 0, start.clamp(max=room - FRAMES + 1), start)
    start = torch.where(step < 0, start.clamp(min=FRAMES - 1), start)
    window = torch.where(step > 0, 0, torch.where(step < 0, FRAMES - 1, FRAMES // 2))
    small = interpolate(back, size=(WINDOW + FRAMES, WINDOW + FRAMES), mode="bilinear", antialias=True)
    movers = sprites(MOVER).to(labels.device)[labels[:, 0]]
    images, masks = [], []
    for frame in range(FRAMES):
        cover = _placed(movers, start + frame * step, WINDOW)
        seen = _cropped(small, window + frame * step, WINDOW)
        images.append(cover[:, :3] + (1 - cover[:, 3:]) * seen)
        masks.append(cover[:, 3:])
    return torch.stack(images, 2), torch.stack(masks, 2)


def _grid(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a square of ``size`` pixels at ``at [N, 2]`` of each of N images."""
    reach = torch.arange(size, device=at.device)
    return (
        torch.arange(len(at), device=at.device)[:, None, None],
        (at[:, :1] + reach)[:, :, None],
        (at[:, 1:] + reach)[:, None, :],
    )


def _placed(sprites: Tensor, at: Tensor, side: int) -> Tensor:
    """Sprites ``[N, 4, s, s]`` on empty canvases ``[N, 4, side, side]``, their corners at ``at [N, 2]``."""
    canvas = torch.zeros(len(sprites), side, side, 4, device=sprites.device)
    canvas[_grid(at, sprites.shape[-1])] = sprites.movedim(1, -1)
    return canvas.movedim(-1, 1)


def _cropped(images: Tensor, at: Tensor, side: int) -> Tensor:
    return images.movedim(1, -1)[_grid(at, side)].movedim(-1, 1)
