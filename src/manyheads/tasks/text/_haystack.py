# SPDX-License-Identifier: Apache-2.0
"""Contexts made of sentences, as long as a number of tokens allows, whatever the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ...errors import UserError

if TYPE_CHECKING:
    from numpy.random import Generator

    from ...data.texts import Text

__all__ = ["Haystack", "TooShort", "fitted", "spread"]

Made = TypeVar("Made")
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n\s*\n")
_LONG = 60  # words of what has no end of a sentence, as tables and code: there it is cut


class TooShort(UserError):
    """What has to stand in a context does not fit into it."""


@dataclass(frozen=True)
class Haystack:
    """Sentences of texts in their order, and the name of the text of each."""

    sentences: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, texts: Sequence[Text]) -> Haystack:
        """The sentences of ``texts``; headings, and sentences with words that are missing (``<unk>``), are left out."""
        found: list[tuple[str, str]] = []
        for text in texts:
            for part in _END.split(text.content):
                said = " ".join(part.split())
                if len(said.split()) < 3 or said.startswith("=") or "<unk>" in said:
                    continue
                pieces = said.split()
                found += [
                    (" ".join(pieces[i : i + _LONG]), text.name) for i in range(0, len(pieces), _LONG)
                ]  # fmt: skip
        if not found:
            raise UserError("the text holds no sentence; give --text with prose")
        return cls(*zip(*found, strict=True))

    def drawn(self, rng: Generator, most: int) -> tuple[list[str], str]:
        """``most`` sentences that follow each other from a random one on, begun again at the end; and their text."""
        start = int(rng.integers(len(self.sentences)))
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(most)], self.texts[start]


def spread(body: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """``body`` with each of ``needles`` put before the sentence at its depth, a fraction of the body."""
    placed = sorted(zip((round(depth * len(body)) for depth in depths), range(len(needles)), strict=True))
    made, last = list[str](), 0
    for place, i in placed:
        made += [*body[last:place], needles[i]]
        last = place
    return [*made, *body[last:]]


def fitted(write: Callable[[int], Made], size: Callable[[Made], int], length: int, most: int) -> Made:
    """``write(n)`` with the largest ``n <= most`` for which it has at most ``length`` tokens.

    Args:
        write: makes what is longer the larger the number that it is given.
        size: its tokens.
        length: how many there may be.
        most: how many ``write`` can be asked for.

    Raises:
        TooShort: not even ``write(0)`` fits.
    """
    fits = write(0)
    if (needed := size(fits)) > length:
        raise TooShort(f"a context of {length} tokens is too short: it takes {needed} and more")
    low, high = 0, 1
    while high <= most and size(made := write(high)) <= length:
        low, high, fits = high, 2 * high, made
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if size(made := write(middle)) <= length:
            low, fits = middle, made
        else:
            high = middle
    return fits
