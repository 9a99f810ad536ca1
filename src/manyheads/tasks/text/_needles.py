# SPDX-License-Identifier: Apache-2.0
"""Constants planted in text and asked for at its end, in the tokens of the model at hand.

``NAME = 12345`` stands on a line of its own; ``assert NAME == `` asks for it. An alias, ``OTHER = NAME``, is asked for
link by link: the answer to ``assert OTHER == `` is ``NAME == 12345``. Names and values are drawn so that all
questions of a run have the same number of tokens: they go through the model as one batch, without padding.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from ._corpus import Ids, encode

__all__ = ["Constant", "UnfitVocabulary", "NeedleInserter"]

_WORDS = (
    "alpha anchor batch border budget cache color count depth factor frame grade height index label layer level limit "
    "margin mode node offset order page phase pixel point port priority queue rate ratio region retry scale score "
    "secret seed shift size speed stage step table target timeout token total version volume weight width window"
).split()


class UnfitVocabulary(ValueError):
    """The vocabulary of a model does not fit the task; the text says why, in a line."""


@dataclass(frozen=True)
class Constant:
    """A name and its value."""

    name: str
    value: str


@dataclass
class NeedleInserter:
    """Draws constants and writes them in tokens.

    Raises:
        UnfitVocabulary: the tokenizer does not keep letters and digits apart, or gives too few questions of one length.
    """

    tokenizer: Any
    question_size: int = 0  # tokens of every question
    answer_size: int = 0  # tokens of every answer
    _starts_line: dict[int, bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        sizes: Counter[tuple[int, int]] = Counter()
        for _ in range(200):
            constant = self._any(rng)
            question, answer = self.ask(constant.name, constant.value)
            back = self.tokenizer.decode([*question, *answer], clean_up_tokenization_spaces=False)
            if f"{constant.name} == {constant.value}" not in back or not answer:
                raise UnfitVocabulary(f"the tokenizer reads `assert {constant.name} == {constant.value}` as {back!r}")
            sizes[len(question), len(answer)] += 1
        (self.question_size, self.answer_size), share = sizes.most_common(1)[0]
        if share < 20:
            raise UnfitVocabulary("the tokenizer splits names and numbers too unevenly to ask questions of one length")

    def draw(self, count: int, rng: Generator) -> list[Constant]:
        """``count`` constants whose names share no word and whose questions have the one length."""
        drawn: list[Constant] = []
        while len(drawn) < count:
            constant = self._any(rng)
            words = {word for c in drawn for word in c.name.split("_")}
            if not words.intersection(constant.name.split("_")) and self.fits(constant.name, constant.value):
                drawn.append(constant)
        return drawn

    def draw_alias(self, target: Constant, taken: Sequence[str], rng: Generator) -> str:
        """Another name for ``target``, none of ``taken``, whose question has the one length."""
        while True:
            name = self._any(rng).name
            if name not in taken and self.fits(name, target.value):
                return name

    def fits(self, name: str, value: str) -> bool:
        question, answer = self.ask(name, value)
        return (len(question), len(answer)) == (self.question_size, self.answer_size)

    def ask(self, name: str, value: str) -> tuple[list[int], list[int]]:
        """Tokens of the question ``assert NAME == `` and of its answer, as the finished line has them.

        For an alias ``value`` is ``NAME == 12345``: it is asserted link by link, which small models can learn. A token
        that holds the end of one and the beginning of the other (" 12" after "==") belongs to the answer.
        """
        whole = encode(self.tokenizer, f"\nassert {name} == {value}")
        stem = encode(self.tokenizer, f"\nassert {name} == ")
        shared = next(
            (i for i, (a, b) in enumerate(zip(whole, stem, strict=False)) if a != b), min(len(whole), len(stem))
        )
        return whole[:shared], whole[shared:]

    def line(self, name: str, value: str) -> list[int]:
        """Tokens of a line ``name = value``, its line end before it."""
        return encode(self.tokenizer, f"\n{name} = {value}")

    def insert(self, body: Ids, lines: Sequence[list[int]], depths: Sequence[float]) -> Ids:
        """``body`` with each line put before the line end nearest to its depth (a fraction of the body)."""
        ends = np.array([i for i, token in enumerate(body) if self._begins_line(int(token))])
        parts: list[Any] = []
        last = 0
        for depth, line in sorted(zip(depths, lines, strict=True), key=lambda pair: pair[0]):
            wanted = depth * len(body)
            cut = int(ends[np.abs(ends - wanted).argmin()]) if len(ends) else int(wanted)
            cut = max(last, cut)
            parts += [body[last:cut], np.array(line, np.int64)]
            last = cut
        return np.concatenate([*parts, body[last:]])

    def _begins_line(self, token: int) -> bool:
        if token not in self._starts_line:
            self._starts_line[token] = self.tokenizer.decode([token]).startswith("\n")
        return self._starts_line[token]

    @staticmethod
    def _any(rng: Generator) -> Constant:
        first, second = rng.choice(len(_WORDS), 2, replace=False)
        return Constant(f"{_WORDS[first]}_{_WORDS[second]}".upper(), str(rng.integers(10_000, 100_000)))
