# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions and questions in a world where some objects keep company, and the same without.

    [image] what is there  a apple and a sunflower and a tree .
    [image] is there a  apple yes  ball no  ...

Of each pair in :data:`PAIRS` the first is there half of the time, and with it the second in ``together`` of the
pictures; without it, in the rest of them. The other objects are there on their own, some often and some seldom. In
decorrelated pictures the second of a pair is there half of the time, whatever the first: who goes by what usually
stands together names what is not there. A caption names all objects, in one order.

Questions are of three kinds, as POPE has them (arXiv 2305.10355): about absent objects drawn at random, those that are
most often there, and those that most often stand with one that is in the picture.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..attention.masks import padded
from .object_scenes import draw_pictures
from .scenes import OBJECTS
from .visual_questions import ANSWERS, Language

__all__ = [
    "KINDS", "OFTEN", "PAIRS", "WORDS", "Texts", "absent", "ask", "caption", "describe", "draw_there", "mentioned",
    "texts",
]  # fmt: skip

PAIRS = ((0, 1), (4, 5))  # apple and sunflower, ghost and octopus
OFTEN = (0.5, 0.5, 0.7, 0.3, 0.5, 0.5, 0.7, 0.3)  # how often each object is there
KINDS = ("random", "popular", "adversarial")
WORDS = (*"what is there a and nothing .".split(), *ANSWERS, *OBJECTS)  # all that is said
_LEFT_OUT = -100  # of the loss

Kind = Literal["random", "popular", "adversarial"]


@dataclass(frozen=True)
class Texts:
    """Texts with a picture each, half captions and half questions.

    Attributes:
        ids: int64 ``[N, T]``, padded behind.
        real: tokens that are no padding, bool ``[N, T]``.
        images: float32 in -1..1, ``[N, 3, side, side]``.
        at: where a token of a caption or an answer is predicted, int64 ``[N, Q]``.
        answers: those tokens, int64 ``[N, Q]``; -100 where a text has fewer.
        there: which objects are in the picture, bool ``[N, 8]``.
    """

    ids: Tensor
    real: Tensor
    images: Tensor
    at: Tensor
    answers: Tensor
    there: Tensor


def draw_there(count: int, generator: Generator, together: float | None) -> Tensor:
    """Which objects pictures show, bool ``[N, 8]``: pairs ``together`` so often, or on their own if None."""
    drawn = torch.rand(count, len(OBJECTS), generator=generator)
    there = drawn < torch.tensor(OFTEN)
    if together is not None:
        for first, second in PAIRS:
            there[:, second] = drawn[:, second] < torch.where(there[:, first], together, 1 - together)
    return there


def describe(language: Language, patches: int) -> list[int]:
    """The prompt of a caption, for a picture of ``patches`` tokens of a side."""
    return [*_image(language, patches), *language.encode("what is there")]


def ask(language: Language, patches: int, thing: int) -> list[int]:
    """The prompt of a question whether an object is there."""
    return [*_image(language, patches), *language.encode("is there a"), *language.encode(OBJECTS[thing])]


def _image(language: Language, patches: int) -> list[int]:
    return [*language.start, *[language.image] * patches**2]


def caption(language: Language, there: Tensor) -> list[int]:
    """Tokens of the caption of a picture that shows ``there [8]``, its end among them."""
    named = [f"a {name}" for name, shown in zip(OBJECTS, there.tolist(), strict=True) if shown]
    words = (" and ".join(named) or "nothing") + " ."
    return [token for word in words.split() for token in language.encode(word)]


def mentioned(language: Language, tokens: list[int]) -> list[int]:
    """Objects that a caption names, in its order."""
    names, found, at = [language.encode(name) for name in OBJECTS], [], 0
    while at < len(tokens):
        here = next((i for i, name in enumerate(names) if tokens[at : at + len(name)] == name), None)
        if here is not None:
            found.append(here)
        at += 1 if here is None else len(names[here])
    return found


def absent(there: Tensor, kind: Kind, generator: Generator) -> int | None:
    """An object to ask for that a picture which shows ``there [8]`` does not; None where there is none of the kind."""
    gone = [i for i, shown in enumerate(there.tolist()) if not shown]
    if kind == "popular":
        gone = [i for i in gone if OFTEN[i] == max(OFTEN[j] for j in gone)]
    elif kind == "adversarial":
        friends = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
        gone = [i for i in gone if i in friends and bool(there[friends[i]])]
    return gone[int(torch.randint(len(gone), (), generator=generator))] if gone else None


def texts(
    language: Language, count: int, generator: Generator, *, grid: int, size: int, patches: int,
    together: float | None, asked: int = 4, split: Literal["train", "test"] = "train",
) -> Texts:  # fmt: skip
    """Draw texts.

    Args:
        language: of the model.
        count: N; the first half are captions.
        generator: on the CPU.
        grid: cells of a side.
        size: pixels of a cell.
        patches: tokens of a side.
        together: see :func:`draw_there`.
        asked: questions of a text, at most 8.
        split: of the photographs.
    """
    there = draw_there(count, generator, together)
    images = draw_pictures(count, generator, grid=grid, size=size, split=split, there=there).images
    chosen = torch.rand(count, len(OBJECTS), generator=generator).argsort(1)[:, :asked].tolist()
    rows, at, answers = [], [], []
    for i in range(count):
        if i < count // 2:
            row, said = describe(language, patches), caption(language, there[i])
            at.append(torch.arange(len(said)) + len(row) - 1)
            answers.append(torch.tensor(said))
            rows.append(torch.tensor(row + said))
            continue
        row, places = [*_image(language, patches), *language.encode("is there a")], list[int]()
        for thing in chosen[i]:
            row += language.encode(OBJECTS[thing])
            places.append(len(row) - 1)
            row += language.encode(ANSWERS[int(there[i, thing])])
        at.append(torch.tensor(places))
        answers.append(torch.tensor([language.answers[int(there[i, thing])] for thing in chosen[i]]))
        rows.append(torch.tensor(row))
    ids, real = padded(rows, language.pad)
    return Texts(ids, real, images, padded(at)[0], padded(answers, _LEFT_OUT)[0], there)
