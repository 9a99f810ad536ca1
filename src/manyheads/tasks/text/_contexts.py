# SPDX-License-Identifier: Apache-2.0
"""The contexts that all arms of a run see: text as it stands, and text with needles and questions."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from ._corpus import Corpus, Ids
from ._needles import Constant, NeedleInserter, UnfitVocabulary

__all__ = ["ALIASES", "CONSTANTS", "DEPTHS", "Contexts", "Haystack", "Question"]

DEPTHS = (0.1, 0.5, 0.9)  # of a single planted constant, as a fraction of the context
CONSTANTS, ALIASES = 4, 3  # planted together for `niah_multikey` and `variable_tracking`


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
    """Draws contexts; the same ones however often and in whatever order they are asked for."""

    corpus: Corpus
    tokenizer: Any
    samples: int
    seed: int
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
            self._inserter = NeedleInserter(self.tokenizer)
        return self._inserter

    def unsupported_reason(self, lines: int, length: int) -> str | None:
        """Why ``lines`` lines cannot be planted in ``length`` tokens of this vocabulary, None if they can."""
        try:
            inserter = self.inserter
        except UnfitVocabulary as error:
            return str(error)
        needed = 4 * lines * (inserter.question_size + inserter.answer_size)
        if length < needed:
            return f"a context of {length} tokens is too short to hide {lines} line(s) in; it needs {needed}"
        return None

    def rng(self, task: str, length: int) -> Generator:
        return np.random.default_rng([self.seed, zlib.crc32(task.encode()), length])

    def plain(self, task: str, length: int, count: int, more: int) -> list[tuple[Ids, str, bool]]:
        """``count`` contexts of ``length`` tokens as they stand in the text, with the ``more`` tokens that follow."""
        key = (task, length)
        if key not in self._drawn:
            windows = self.corpus.windows(length + more - len(self.start), count, self.rng(task, length))
            begin = np.array(self.start, np.int64)
            self._drawn[key] = [(np.concatenate([begin, w.ids]), w.text, w.overlaps) for w in windows]
        drawn: list[tuple[Ids, str, bool]] = self._drawn[key]
        return drawn

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
            self._drawn[key] = [
                self._compose(window.ids, window.text, window.overlaps, length, *plan)
                for window, plan in zip(windows, plans, strict=True)
            ]
        drawn: list[Haystack] = self._drawn[key]
        return drawn

    def _compose(
        self, ids: Ids, text: str, overlaps: bool, length: int, lines: list[list[int]], depths: list[float],
        questions: list[Question],
    ) -> Haystack:  # fmt: skip
        body = ids[: length - len(self.start) - sum(map(len, lines))]
        whole = np.concatenate([np.array(self.start, np.int64), self.inserter.insert(body, lines, depths)])
        return Haystack(whole, text, questions, overlaps)

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
        lines += [inserter.line(name, target.name) for name, target in aliases]
        questions = [
            Question("niah_multikey", *inserter.ask(c.name, c.value), depth)
            for c, depth in zip(constants, depths[:CONSTANTS], strict=True)
        ]
        questions += [
            Question("variable_tracking", *inserter.ask(name, f"{target.name} == {target.value}"), depth)
            for (name, target), depth in zip(aliases, depths[CONSTANTS:], strict=True)
        ]
        return lines, depths, questions
