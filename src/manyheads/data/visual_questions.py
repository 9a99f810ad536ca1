# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures and films whose answers are known, as token ids for a model that reads images among text.

    presence   [image] filler  is there a  apple yes  ghost no  ...
    instructed say logic [image] filler  is there a  apple .  ghost .  ...      answers true, false, ...
    order      [frame] [frame] ...  is it before  apple ghost yes  ...
    sides      [distance] [distance] ...  is it  near apple yes  left ghost no  ...

Objects of :mod:`manyheads.data.object_scenes`; every other answer is yes, on average, whatever was said before. Filler
is words that say nothing, between the images and the questions, for distance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..attention.masks import padded
from .object_scenes import draw_depths, draw_films, draw_pictures
from .scenes import OBJECTS

__all__ = [
    "ANSWERS", "FILLERS", "FORMATS", "INSTRUCTED_WORDS", "SIDES", "WORDS", "Instructed", "Language", "Questions",
    "instructed", "order", "presence", "sides",
]  # fmt: skip

ANSWERS = ("no", "yes")
FILLERS = tuple("time year people way day man thing life hand part place case week point home water".split())
SIDES = ("near", "upper", "left", "there")  # of each axis the half that begins at 0, or anywhere
WORDS = (*"is there a it before".split(), *ANSWERS, *OBJECTS, *FILLERS)  # all that is said

FORMATS = {"plain": ANSWERS, "logic": ("false", "true"), "switch": ("off", "on"), "clock": ("never", "always")}
INSTRUCTED_WORDS = (
    *dict.fromkeys((*WORDS, "say", ".", *FORMATS, *(word for pair in FORMATS.values() for word in pair))),
)


@dataclass(frozen=True)
class Language:
    """How a model writes text.

    Attributes:
        encode: token ids of words that stand after others.
        start: tokens that a text begins with.
        image: token that stands for a patch.
        pad: token of padding.
    """

    encode: Callable[[str], list[int]]
    start: tuple[int, ...]
    image: int
    pad: int

    @property
    def answers(self) -> tuple[int, int]:
        """First tokens of no and yes."""
        no, yes = (self.encode(word)[0] for word in ANSWERS)
        return no, yes


@dataclass(frozen=True)
class Questions:
    """Texts with images, and what is asked in them.

    Attributes:
        ids: int64 ``[N, T]``, padded behind.
        real: tokens that are no padding, bool ``[N, T]``.
        images: float32 in -1..1, ``[N * images of a text, 3, side, side]``, in their order.
        at: where the answer to each question is predicted, int64 ``[N, Q]``.
        truth: whether it is yes, bool ``[N, Q]``.
        cells: cell of the object asked for, ``[N, Q]``, -1 where there is none; of a film, frames that are between; of
            a scene in depth, the word of ``SIDES`` that is asked for.
    """

    ids: Tensor
    real: Tensor
    images: Tensor
    at: Tensor
    truth: Tensor
    cells: Tensor


def presence(
    language: Language, count: int, generator: Generator, *, grid: int, size: int, patches: int, asked: int = 6,
    filler: int = 32, split: Literal["train", "test"] = "train",
) -> Questions:  # fmt: skip
    """Pictures, and whether each of ``asked`` objects is there.

    Args:
        language: of the model.
        count: N.
        generator: on the CPU.
        grid: cells of a side.
        size: pixels of a cell.
        patches: tokens of a side.
        asked: Q, at most 8.
        filler: words between image and questions.
        split: of the photographs.
    """
    picture = draw_pictures(count, generator, grid=grid, size=size, split=split)
    chosen = torch.rand(count, len(OBJECTS), generator=generator).argsort(1)[:, :asked]
    cells = picture.cells.gather(1, chosen)
    asks = [[OBJECTS[i] for i in row] for row in chosen.tolist()]
    return _told(language, picture.images, patches, "is there a", asks, cells >= 0, cells, filler, generator)


@dataclass(frozen=True)
class Instructed:
    """Texts that say first in which words questions about the image are to be answered.

    Attributes:
        ids, real, images, at: as of :class:`Questions`; no answer stands in a text.
        truth: whether the object is there, bool ``[N, Q]``.
        formats: which of :data:`FORMATS`, ``[N]``.
        answers: first tokens of the right answers, ``[N, Q]``.
        tokens: of no and yes in each format, ``[formats, 2]``.
    """

    ids: Tensor
    real: Tensor
    images: Tensor
    at: Tensor
    truth: Tensor
    formats: Tensor
    answers: Tensor
    tokens: Tensor


def instructed(
    language: Language, count: int, generator: Generator, *, grid: int, size: int, patches: int, asked: int = 4,
    filler: int = 8, split: Literal["train", "test"] = "train",
) -> Instructed:  # fmt: skip
    """Pictures, an instruction before each, and questions behind it; arguments as for :func:`presence`."""
    picture = draw_pictures(count, generator, grid=grid, size=size, split=split)
    chosen = torch.rand(count, len(OBJECTS), generator=generator).argsort(1)[:, :asked]
    truth = picture.cells.gather(1, chosen) >= 0
    formats = torch.randint(len(FORMATS), (count,), generator=generator)
    drawn = torch.randint(len(FILLERS), (count, filler), generator=generator).tolist()
    tokens = torch.tensor([[language.encode(word)[0] for word in pair] for pair in FORMATS.values()])
    names, rows, at = list(FORMATS), [], []
    for which, words, objects in zip(formats.tolist(), drawn, chosen.tolist(), strict=True):
        row = [*language.start, *language.encode(f"say {names[which]}"), *[language.image] * patches**2]
        row += [token for word in words for token in language.encode(FILLERS[word])] + language.encode("is there a")
        places = []
        for thing in objects:
            row += language.encode(OBJECTS[thing])
            places.append(len(row) - 1)
            row += language.encode(".")
        rows.append(torch.tensor(row))
        at.append(places)
    ids, real = padded(rows, language.pad)
    answers = tokens[formats[:, None], truth.long()]
    return Instructed(ids, real, picture.images, torch.tensor(at), truth, formats, answers, tokens)


def order(
    language: Language, count: int, generator: Generator, *, grid: int, size: int, patches: int, frames: int = 4,
    asked: int = 6, filler: int = 0, split: Literal["train", "test"] = "train",
) -> Questions:  # fmt: skip
    """Films, and of ``asked`` pairs of objects in them whether the first comes before the second.

    Args:
        language, count, generator, grid, size, patches, filler, split: as for :func:`presence`, of a frame.
        frames: of a film, at most 8.
        asked: Q.
    """
    film = draw_films(count, frames, generator, grid=grid, size=size, split=split)
    pairs = torch.rand(count, asked, frames, generator=generator).argsort(2)[..., :2]
    first, second = (film.objects.gather(1, pairs[..., i]) for i in range(2))
    asks = [
        [f"{OBJECTS[a]} {OBJECTS[b]}" for a, b in zip(*row, strict=True)]
        for row in zip(first.tolist(), second.tolist(), strict=True)
    ]
    apart = pairs[..., 1] - pairs[..., 0]
    images = film.images.flatten(0, 1)
    return _told(language, images, patches, "is it before", asks, apart > 0, apart.abs(), filler, generator)


def sides(
    language: Language, count: int, generator: Generator, *, planes: int, grid: int, size: int, patches: int,
    objects: int = 5, filler: int = 0, split: Literal["train", "test"] = "train", apart: bool = False,
) -> Questions:  # fmt: skip
    """Scenes in depth; of every object whether it is there, or in the near, upper or left half.

    Of one that is not there it is asked whether it is; of the others mostly where they are, and so often whether they
    are there that about half of such answers are yes.

    Args:
        language, count, generator, grid, size, patches, filler, split: as for :func:`presence`, of a distance.
        planes: distances, an even number, as is ``grid``.
        objects: in a scene; others are not there.
        apart: a text for each question, one scene after the other, instead of one for all of a scene.
    """
    scene = draw_depths(count, generator, planes=planes, grid=grid, size=size, objects=objects, split=split)
    order = torch.rand(count, len(OBJECTS), generator=generator).argsort(1)
    there = torch.zeros(count, len(OBJECTS), dtype=torch.bool).scatter(1, scene.objects, True).gather(1, order)
    spots = torch.zeros(count, len(OBJECTS), 3, dtype=torch.long)
    spots.scatter_(1, scene.objects[..., None].expand(-1, -1, 3), scene.places)
    spots = spots.gather(1, order[..., None].expand(-1, -1, 3))
    whether = torch.rand(order.shape, generator=generator) < (len(OBJECTS) - objects) / objects
    axis = torch.randint(len(SIDES) - 1, order.shape, generator=generator)
    axis = torch.where(there & ~whether, axis, len(SIDES) - 1)
    truth = torch.cat([spots < torch.tensor([planes, grid, grid]) // 2, there[..., None]], 2)
    asks = [
        [f"{SIDES[b]} {OBJECTS[a]}" for a, b in zip(*row, strict=True)]
        for row in zip(order.tolist(), axis.tolist(), strict=True)
    ]
    truth, images = truth.gather(2, axis[..., None])[..., 0], scene.images
    if apart:
        images, asks = images.repeat_interleave(len(OBJECTS), 0), [[ask] for row in asks for ask in row]
        truth, axis = truth.view(-1, 1), axis.view(-1, 1)
    return _told(language, images.flatten(0, 1), patches, "is it", asks, truth, axis, filler, generator)


def _told(
    language: Language, images: Tensor, patches: int, opening: str, asks: list[list[str]], truth: Tensor,
    cells: Tensor, filler: int, generator: Generator,
) -> Questions:  # fmt: skip
    """Texts that begin with their images."""
    drawn = torch.randint(len(FILLERS), (len(asks), filler), generator=generator).tolist()
    tokens = len(images) // len(asks) * patches * patches
    rows, at = [], []
    for words, said, answers in zip(drawn, asks, truth.tolist(), strict=True):
        row, places = [*language.start, *[language.image] * tokens], []
        row += [token for word in words for token in language.encode(FILLERS[word])] + language.encode(opening)
        for ask, answer in zip(said, answers, strict=True):
            row += language.encode(ask)
            places.append(len(row) - 1)
            row += language.encode(ANSWERS[answer])
        rows.append(torch.tensor(row))
        at.append(places)
    ids, real = padded(rows, language.pad)
    return Questions(ids, real, images, torch.tensor(at), truth, cells)
