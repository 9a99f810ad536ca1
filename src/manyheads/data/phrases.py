# SPDX-License-Identifier: Apache-2.0
"""A language of phrases and definitions, in which it is known where a model has to plan and what it has to look up.

Text is a row of phrases. The first token of a phrase, its head, is drawn; the head fixes all that follow, its tail,
and how many there are. Tails are written with few tokens that all phrases share, so that within a phrase a model must
look at its head. Now and then comes DEF and a value; 10 to 50 tokens later comes USE, and after it the value has to be
given again, which takes a look at the definition. One definition is open at a time.

    BOS  h7 t3 t1 t1  DEF v5  h2 t9 t4  h31 t3 t6 t6 t2  USE v5  h7 t3 t1 t1 ...
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["BOS", "DEF", "USE", "PhraseLanguage", "Phrases"]

BOS, DEF, USE = 0, 1, 2


@dataclass(frozen=True)
class Phrases:
    """Sequences, and where what stands in them.

    Attributes:
        ids: ``[B, T]`` tokens.
        starts: ``[B, T]``, True at the heads of phrases.
        definitions: ``[B, T]``, True at values behind DEF that are used within the sequence.
        uses: ``[B, T]``, True at USE.
        free: ``[B, T]``, True where the next token is not fixed by those before it.
    """

    ids: Tensor
    starts: Tensor
    definitions: Tensor
    uses: Tensor
    free: Tensor


@dataclass(frozen=True)
class PhraseLanguage:
    """The phrases of a language; its tokens are BOS, DEF, USE, the heads, the tokens of tails, and the values.

    Attributes:
        tails: for each phrase the tokens behind its head.
        shared: how many tokens tails are written with.
        values: how many values there are.
        nearest, farthest: least and greatest distance from a defined value to USE.
    """

    tails: tuple[tuple[int, ...], ...]
    shared: int
    values: int
    nearest: int = 10
    farthest: int = 50

    @staticmethod
    def of(seed: int, phrases: int = 40, shared: int = 20, values: int = 16) -> "PhraseLanguage":
        """Draw a language: phrases of 3 to 6 tokens, head counted."""
        source = np.random.default_rng(seed)
        first = 3 + phrases
        drawn = [first + source.integers(0, shared, int(size)) for size in source.integers(2, 6, phrases)]
        return PhraseLanguage(tuple(tuple(int(token) for token in tail) for tail in drawn), shared, values)

    @property
    def vocab(self) -> int:
        return 3 + len(self.tails) + self.shared + self.values

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Phrases:
        """``batch`` sequences of ``length`` tokens, on the CPU; ``generator`` fixes them."""
        source = np.random.default_rng(torch.randint(2**62, (1,), generator=generator).tolist())
        ids = np.zeros((batch, length), dtype=np.int64)
        marks = np.zeros((4, batch, length), dtype=bool)
        for row in range(batch):
            self._fill(source, ids[row], marks[:, row])
        return Phrases(torch.from_numpy(ids), *(torch.from_numpy(mark) for mark in marks))

    def _fill(self, source: np.random.Generator, ids: np.ndarray, marks: np.ndarray) -> None:
        """Write one row."""
        length = len(ids)
        starts, definitions, uses, free = marks
        ids[0], place = BOS, 1
        free[0] = True
        due, defined, value = (
            int(source.integers(1, 16)),
            0,
            0,
        )  # when DEF or USE comes next; where the open value stands
        longest = max(map(len, self.tails))
        while place < length:
            if place < due:
                head = int(source.integers(len(self.tails)))
                piece = (3 + head, *self.tails[head])
                starts[place] = True
            elif not defined:
                value = self.vocab - 1 - int(source.integers(self.values))
                piece, defined = (DEF, value), place + 1
                free[place] = True
                due = defined + int(source.integers(self.nearest, self.farthest - longest))
            else:
                piece = (USE, value)
                uses[place] = True
                definitions[defined] = True
                defined, due = 0, place + 2 + int(source.integers(1, 7))
            end = min(length, place + len(piece))
            ids[place:end] = piece[: end - place]
            free[end - 1] = True
            place = end
