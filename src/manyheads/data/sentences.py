# SPDX-License-Identifier: Apache-2.0
"""Sentences and pairs of them, with what people say of them.

``snips``     requests to an assistant by seven intents; 13,084 to train on, 700 to choose by, 700 to test
``sick``      pairs of sentences, how related they are from 1 to 5, and whether one follows from the other, contradicts
              it or neither; 4,500 to train on, 4,927 to test
``sts-2014-images``, ``sts-2014-headlines``   750 pairs each with their similarity from 0 to 5, to test on
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from . import files

__all__ = ["PAIRS", "Pair", "Request", "pairs", "requests"]

PAIRS = ("sick", "sts-2014-images", "sts-2014-headlines")
Part = Literal["train", "validation", "test"]
_PARTS: tuple[tuple[Part, str], ...] = (("train", "train"), ("validation", "dev"), ("test", "test"))


@dataclass(frozen=True, slots=True)
class Request:
    """A request, its intent, and a tag of each word: ``O``, or ``B-`` and ``I-`` with the name of a slot."""

    name: str
    text: str
    intent: str
    part: Part
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences, their similarity, and ``ENTAILMENT``, ``CONTRADICTION``, ``NEUTRAL``, or nothing."""

    name: str
    first: str
    second: str
    score: float
    relation: str
    part: Part


def requests() -> list[Request]:
    """The requests of SNIPS, in its order.

    Raises:
        UserError: they cannot be had.
    """
    found = []
    with zipfile.ZipFile(files.local("snips") or files.path("snips-jointbert")) as archive:
        home = next(name for name in archive.namelist() if name.endswith("snips/train/label")).removesuffix(
            "train/label"
        )
        for part, folder in _PARTS:
            texts, intents, tags = (
                archive.read(f"{home}{folder}/{name}").decode().splitlines() for name in ("seq.in", "label", "seq.out")
            )
            found += [
                Request(f"{part} {i}", text.strip(), intent.strip(), part, tuple(said.split()))
                for i, (text, intent, said) in enumerate(zip(texts, intents, tags, strict=True))
            ]
    return found


def pairs(name: str) -> list[Pair]:
    """Pairs by name, one of :data:`PAIRS`, in the order of their source.

    Raises:
        UserError: there are none of that name, or they cannot be had.
    """
    if name not in PAIRS:
        raise UserError(f"there are no pairs of sentences {name!r}; there are {', '.join(PAIRS)}")
    if name == "sick":
        return [*_sick("train"), *_sick("test")]
    rows = [line.split("\t") for line in files.text(name).splitlines()]
    return [
        Pair(f"{i}", first, second, float(score), "", "test") for i, (score, first, second) in enumerate(rows) if score
    ]


def _sick(part: Part) -> list[Pair]:
    rows = [line.split("\t") for line in files.text(f"sick-{part}").splitlines()[1:]]
    return [Pair(f"{part} {row[0]}", row[1], row[2], float(row[3]), row[4].strip(), part) for row in rows if row[0]]
