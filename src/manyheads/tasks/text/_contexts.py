# SPDX-License-Identifier: Apache-2.0
"""The contexts that all arms of a run see: text as it stands, and text with needles and questions."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from ._corpus import Corpus, Ids
from ._needles import CODE, Constant, NeedleInserter, UnfitVocabulary, Wording

__all__ = ["ALIASES", "CONSTANTS", "DEPTHS", "PASSAGE", "Contexts", "Haystack", "Question"]

DEPTHS = (0.1, 0.5, 0.9)  # of a single planted constant, as a fraction of the context
CONSTANTS, ALIASES = 4, 3  # planted together for `niah_multikey` and `variable_tracking`
PASSAGE = 48  # tokens of the passage that a repeated text has over and over


@dataclass(frozen=True)
class Question:
    """What is asked of a context, in tokens, and the task it counts for."""

    task: str
    question: list[int]
    answer: list[int]
    depth: float


@dataclass(frozen=True)
class Haystack:
    """A context with needles, and the questions about them."""

    ids: Ids
    text: str
    questions: list[Question]
    overlaps: bool


@dataclass
class Contexts:
    """Draws contexts; the same ones however often and in whatever order they are asked for.

    Attributes:
        repeat: part of a context, in [0, 1), that is one passage of it over and over, spread evenly.
        wording: of what is planted.
    """

    corpus: Corpus
    tokenizer: Any
    samples: int
    seed: int
    repeat: float = 0.0
    wording: Wording = CODE
    start: list[int] = field(init=False)  # tokens that the tokenizer puts before a text
    _inserter: NeedleInserter | None = field(default=None, init=False)
    _drawn: dict[tuple[str, int], Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        begin = getattr(self.tokenizer, "bos_token_id", None)
        self.start = [begin] if begin is not None and self.tokenizer.encode("x")[:1] == [begin] else []

    @property
    def inserter(self) -> NeedleInserter:
        """The inserter for this vocabulary; raises UnfitVocabulary where there is none."""
        if self._inserter is None:
            self._inserter = NeedleInserter(self.tokenizer, self.wording)
        return self._inserter

    def unsupported_reason(self, lines: int, length: int) -> str | None:
        """Why ``lines`` lines cannot be planted in ``length`` tokens of this vocabulary, None if they can."""
        try:
            inserter = self.inserter
        except UnfitVocabulary as error:
            return str(error)
        needed = 4 * lines * inserter.line_size
        if length < needed:
            return f"a context of {length} tokens is too short to hide {lines} line(s) in; it needs {needed}"
        return None

    def rng(self, task: str, length: int) -> Generator:
        return np.random.default_rng([self.seed, zlib.crc32(task.encode()), length])

    def plain(self, task: str, length: int, count: int, more: int) -> list[tuple[Ids, str, bool]]:
        """``count`` contexts of ``length`` tokens as they stand in the text, with the ``more`` tokens that follow."""
        key = (task, length)
        if key not in self._drawn:
            own = self._own(length, [])
            windows = self.corpus.windows(own + more, count, self.rng(task, length))
            begin, wholes = np.array(self.start, np.int64), self._repeated(length, [w.ids[:own] for w in windows])
            self._drawn[key] = [
                (np.concatenate([begin, whole, w.ids[own:]]), w.text, w.overlaps)
                for whole, w in zip(wholes, windows, strict=True)
            ]
        drawn: list[tuple[Ids, str, bool]] = self._drawn[key]
        return drawn

    def _passages(self, length: int) -> int:
        return int(self.repeat * length / PASSAGE)

    def _repeated(self, length: int, bodies: list[Ids]) -> list[Ids]:
        """Each of ``bodies`` with its passage put in as often as ``length`` asks for, at line ends."""
        count = self._passages(length)
        if not count:
            return bodies
        drawn = self.corpus.windows(PASSAGE, len(bodies), self.rng("passage", length))
        depths = [i / count for i in range(count)]
        return [
            self.inserter.insert(body, [window.ids.tolist()] * count, depths)
            for body, window in zip(bodies, drawn, strict=True)
        ]

    def single(self, length: int) -> list[Haystack]:
        """Contexts of ``length`` tokens with one constant, at each depth in turn."""
        return self._with_needles("niah_single", length, self._one)

    def multikey(self, length: int) -> list[Haystack]:
        """Contexts of ``length`` tokens with several constants and aliases of some of them."""
        return self._with_needles("niah_multikey", length, self._many)

    def _with_needles(
        self,
        task: str,
        length: int,
        make: Callable[[int, Generator], tuple[list[list[int]], list[float], list[Question]]],
    ) -> list[Haystack]:
        key = (task, length)
        if key not in self._drawn:
            rng = self.rng(task, length)
            plans = [make(i, rng) for i in range(self.samples)]
            windows = self.corpus.windows(length, self.samples, rng)
            bodies = [
                self.inserter.insert(w.ids[: self._own(length, lines)], lines, depths)
                for w, (lines, depths, _) in zip(windows, plans, strict=True)
            ]
            begin = np.array(self.start, np.int64)
            self._drawn[key] = [
                Haystack(np.concatenate([begin, whole]), w.text, questions, w.overlaps)
                for whole, w, (_, _, questions) in zip(self._repeated(length, bodies), windows, plans, strict=True)
            ]
        drawn: list[Haystack] = self._drawn[key]
        return drawn

    def _own(self, length: int, lines: list[list[int]]) -> int:
        """Tokens of a context that are neither lines planted in it nor a repeated passage."""
        return length - len(self.start) - sum(map(len, lines)) - self._passages(length) * PASSAGE

    def _one(self, index: int, rng: Generator) -> tuple[list[list[int]], list[float], list[Question]]:
        constant = self.inserter.draw(1, rng)[0]
        depth = DEPTHS[index % len(DEPTHS)]
        question = Question("niah_single", *self.inserter.ask(constant.name, constant.value), depth)
        return [self.inserter.line(constant.name, constant.value)], [depth], [question]

    def _many(self, index: int, rng: Generator) -> tuple[list[list[int]], list[float], list[Question]]:
        del index
        inserter = self.inserter
        constants = inserter.draw(CONSTANTS, rng)
        aliases: list[tuple[str, Constant]] = []
        for target in constants[:ALIASES]:
            taken = [c.name for c in constants] + [name for name, _ in aliases]
            aliases.append((inserter.draw_alias(target, taken, rng), target))
        places = sorted(rng.uniform(0.02, 0.95, CONSTANTS + ALIASES))
        rank = rng.permutation(CONSTANTS + ALIASES)
        for i in range(ALIASES):  # an alias stands after its constant, as a program would have it
            rank[[i, CONSTANTS + i]] = sorted(rank[[i, CONSTANTS + i]])
        depths = [float(places[r]) for r in rank]
        lines = [inserter.line(c.name, c.value) for c in constants]
        lines += [inserter.alias_line(name, target) for name, target in aliases]
        questions = [
            Question("niah_multikey", *inserter.ask(c.name, c.value), depth)
            for c, depth in zip(constants, depths[:CONSTANTS], strict=True)
        ]
        questions += [
            Question("variable_tracking", *inserter.ask_alias(name, target), depth)
            for (name, target), depth in zip(aliases, depths[CONSTANTS:], strict=True)
        ]
        return lines, depths, questions
