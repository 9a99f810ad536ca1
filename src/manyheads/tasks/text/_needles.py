# SPDX-License-Identifier: Apache-2.0
"""Numbers planted in text and asked for at its end, in the words of the text and the tokens of the model at hand.

In code ``NAME = 12345`` stands on a line of its own, and ``assert NAME == `` asks for it. In prose a sentence says what
the secret number of some thing is, and a question asks for it. An alias, ``OTHER = NAME``, is asked for link by link:
the answer to ``assert OTHER == `` is ``NAME == 12345``. Names and values are drawn so that all questions of a run have
the same number of tokens: they go through the model as one batch, without padding.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from ._corpus import Ids, encode

__all__ = ["CODE", "PROSE", "QUALITIES", "THINGS", "Constant", "NeedleInserter", "UnfitVocabulary", "Wording"]

_WORDS = (
    "alpha anchor batch border budget cache color count depth factor frame grade height index label layer level limit "
    "margin mode node offset order page phase pixel point port priority queue rate ratio region retry scale score "
    "secret seed shift size speed stage step table target timeout token total version volume weight width window"
).split()
QUALITIES = (
    "amber ancient bright broken calm clever crimson distant empty faded gentle golden green hidden hollow iron "
    "lonely narrow old patient pale quiet red rusty silent silver small soft steady stone tall tiny wandering white "
    "wild wooden"
).split()
THINGS = (
    "anchor arrow basket bell boat bridge candle castle clock cloud coat compass desert drum engine feather ferry "
    "field forest garden hammer harbor island kettle ladder lantern letter lighthouse market meadow mirror mountain "
    "painter piano river road rope saddle ship spoon street table tower train valley violin wagon window"
).split()


@dataclass(frozen=True)
class Wording:
    """How a number is planted and asked for.

    Attributes:
        words: where the two words of a name are drawn from.
        name: the two words as a name.
        planted: a name's line or sentence, what stands before it included.
        alias: the same of a name for another name.
        asked, answer: question and answer.
        alias_asked, alias_answer: the same of an alias; the answer names the other name and its value.
        sentences: whether a sentence may stand behind any other; else a line is put between lines.
    """

    words: tuple[Sequence[str], Sequence[str]]
    name: str
    planted: str
    alias: str
    asked: str
    answer: str
    alias_asked: str
    alias_answer: str
    sentences: bool


CODE = Wording(
    (_WORDS, _WORDS), "{0}_{1}", "\n{name} = {value}", "\n{name} = {other}", "\nassert {name} == ", "{value}",
    "\nassert {name} == ", "{other} == {value}", False,
)  # fmt: skip
PROSE = Wording(
    (QUALITIES, THINGS), "the {0} {1}", " The secret number of {name} is {value}.",
    " The secret number of {name} is the same as that of {other}.",
    "\n\nWhat is the secret number of {name}? The secret number of {name} is", " {value}",
    "\n\nWhat is the secret number of {name}? It is the same as that of", " {other}, which is {value}", True,
)  # fmt: skip


class UnfitVocabulary(ValueError):
    """The vocabulary of a model does not fit the task; the text says why, in a line."""


@dataclass(frozen=True)
class Constant:
    """A name of two words, and its value."""

    name: str
    value: str
    words: tuple[str, str]


@dataclass
class NeedleInserter:
    """Draws constants and writes them in tokens.

    Raises:
        UnfitVocabulary: the tokenizer does not keep letters and digits apart, or gives too few questions of one length.
    """

    tokenizer: Any
    wording: Wording = CODE
    question_size: int = 0  # tokens of every question
    answer_size: int = 0  # tokens of every answer
    line_size: int = 0  # tokens that a planted number takes, about
    _text: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        sizes: Counter[tuple[int, int]] = Counter()
        for _ in range(200):
            constant = self._any(rng)
            question, answer = self.ask(constant.name, constant.value)
            back = self.tokenizer.decode([*question, *answer], clean_up_tokenization_spaces=False)
            meant = (self.wording.asked + self.wording.answer).format(name=constant.name, value=constant.value)
            if meant.strip() not in back or not answer:
                raise UnfitVocabulary(f"the tokenizer reads `{meant.strip()}` as {back!r}")
            sizes[len(question), len(answer)] += 1
        (self.question_size, self.answer_size), share = sizes.most_common(1)[0]
        if share < 20:
            raise UnfitVocabulary("the tokenizer splits names and numbers too unevenly to ask questions of one length")
        self.line_size = len(self.line(constant.name, constant.value))

    def draw(self, count: int, rng: Generator) -> list[Constant]:
        """``count`` constants whose names share no word and whose questions have the one length."""
        drawn: list[Constant] = []
        while len(drawn) < count:
            constant = self._any(rng)
            words = {word for c in drawn for word in c.words}
            if not words.intersection(constant.words) and self.fits(constant.name, constant.value):
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
        """Tokens of the question for ``name`` and of its answer, as the finished line has them.

        A token that holds the end of one and the beginning of the other (" 12" after "==") belongs to the answer.
        """
        return _cut(self.tokenizer, self.wording.asked.format(name=name), self.wording.answer.format(value=value))

    def ask_alias(self, name: str, target: Constant) -> tuple[list[int], list[int]]:
        """The same for another name of ``target``: asked for link by link, which small models can learn."""
        answer = self.wording.alias_answer.format(other=target.name, value=target.value)
        return _cut(self.tokenizer, self.wording.alias_asked.format(name=name), answer)

    def line(self, name: str, value: str) -> list[int]:
        """Tokens of the line or sentence that says the value of ``name``."""
        return encode(self.tokenizer, self.wording.planted.format(name=name, value=value))

    def alias_line(self, name: str, target: Constant) -> list[int]:
        """Tokens of the line or sentence that says that ``name`` is another name of ``target``."""
        return encode(self.tokenizer, self.wording.alias.format(name=name, other=target.name))

    def insert(self, body: Ids, lines: Sequence[list[int]], depths: Sequence[float]) -> Ids:
        """``body`` with each line put where one ends, as near as can be to its depth (a fraction of the body)."""
        ends = np.array([i for i in range(1, len(body)) if self._ends_before(int(body[i - 1]), int(body[i]))])
        parts: list[Any] = []
        last = 0
        for depth, line in sorted(zip(depths, lines, strict=True), key=lambda pair: pair[0]):
            wanted = depth * len(body)
            cut = int(ends[np.abs(ends - wanted).argmin()]) if len(ends) else int(wanted)
            cut = max(last, cut)
            parts += [body[last:cut], np.array(line, np.int64)]
            last = cut
        return np.concatenate([*parts, body[last:]])

    def _ends_before(self, token: int, following: int) -> bool:
        """Whether a line, or in prose a sentence, ends between two tokens."""
        after = self._read(following)
        if after.startswith("\n"):
            return True
        return self.wording.sentences and self._read(token).endswith((".", "!", "?")) and after[:1].isspace()

    def _read(self, token: int) -> str:
        if token not in self._text:
            # Behind another token, where the space before a word is not lost.
            before, both = self.tokenizer.decode([token]), self.tokenizer.decode([token, token])
            self._text[token] = both[len(before) :] if both.startswith(before) else before
        return self._text[token]

    def _any(self, rng: Generator) -> Constant:
        first, second = self.wording.words
        if first is second:
            i, j = rng.choice(len(first), 2, replace=False)
        else:
            i, j = rng.integers(len(first)), rng.integers(len(second))
        words = (first[i], second[j])
        name = self.wording.name.format(*words)
        value = str(rng.integers(10_000, 100_000))
        return Constant(name if self.wording.sentences else name.upper(), value, words)


def _cut(tokenizer: Any, stem: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of question and answer, cut where they first differ from those of the question alone."""
    whole, begun = encode(tokenizer, stem + answer), encode(tokenizer, stem)
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, begun, strict=False)) if a != b), min(len(whole), len(begun))
    )
    return whole[:shared], whole[shared:]
