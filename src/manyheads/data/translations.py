# SPDX-License-Identifier: Apache-2.0
"""Sentences in several languages: Multi30k, captions in four; and a language made up, with idioms.

The language made up is for where nothing is to be downloaded. A sentence has 5 to 11 words of 60; each has one word of
the target language, and a word of the second half of the vocabulary changes places with the one after it. Sometimes an
idiom stands in it, three words in a row of which each is met alone too, whose translation are two other words.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from . import files

__all__ = ["IDIOMS", "Language", "Pair", "captions", "made_up", "multi30k", "pairs"]

Pair = tuple[str, str]
Language = Literal["en", "de", "fr", "cs"]
Part = Literal["train", "val", "test"]
_WORDS = 60
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru")
# The numbers of their words, and the words that stand for them.
IDIOMS = {(3, 17, 41): ("zaxo", "quve"), (8, 52, 29): ("wyze", "jaxi"), (22, 5, 36): ("xuja", "vozy")}


def captions(part: Part, languages: Sequence[Language]) -> list[tuple[str, ...]]:
    """Multi30k's captions of a part in several languages, in its order: 29,000, 1,014, 1,000 (the test set of 2016).

    Raises:
        UserError: the files cannot be had.
    """
    sides = []
    for language in languages:
        with gzip.open(files.path(f"multi30k-{part}-{language}"), "rt", encoding="utf-8") as lines:
            sides.append([line.strip() for line in lines])
    return list(zip(*sides, strict=True))


def multi30k(part: Part, source: Language = "de", target: Language = "en") -> list[Pair]:
    """Captions of a part and their translations; as :func:`captions`."""
    return [(first, second) for first, second in captions(part, (source, target))]


def made_up(count: int, rng: np.random.Generator, idioms: float = 0.3) -> list[Pair]:
    """``count`` pairs of the language made up, of which a share of ``idioms`` have one."""
    return [_pair(rng, rng.random() < idioms) for _ in range(count)]


def _pair(rng: np.random.Generator, idiom: bool) -> Pair:
    words = [int(word) for word in rng.integers(0, _WORDS, int(rng.integers(5, 12)))]
    mine = list(IDIOMS)[int(rng.integers(len(IDIOMS)))]
    at = int(rng.integers(len(words) + 1)) if idiom else len(words)
    parts = [_turned(words[:at]), list(IDIOMS[mine]) if idiom else [], _turned(words[at:])]
    said = [_word(word) for word in [*words[:at], *(mine if idiom else ()), *words[at:]]]
    return " ".join(said), " ".join(word for part in parts for word in part)


def _turned(words: list[int]) -> list[str]:
    """The translation word by word, the later half of the vocabulary behind the word that follows it."""
    order, at = [], 0
    while at < len(words):
        swap = words[at] >= _WORDS // 2 and at + 1 < len(words)
        order += [words[at + 1], words[at]] if swap else [words[at]]
        at += 1 + swap
    return [_word(word, _SYLLABLES[::-1]) + "s" for word in order]


def _word(number: int, syllables: tuple[str, ...] = _SYLLABLES) -> str:
    return syllables[number // 10] + syllables[number % 10]


def pairs(corpus: str, source: Language = "de", target: Language = "en") -> Callable[[Part], list[Pair]]:
    """The parts of ``multi30k`` or of ``made``, which has 2,000 pairs to train on and 300 of each other part."""
    if corpus == "multi30k":
        return lambda part: multi30k(part, source, target)
    numbers = {"train": (0, 2000), "val": (1, 300), "test": (2, 300)}
    return lambda part: made_up(numbers[part][1], np.random.default_rng(numbers[part][0]))
