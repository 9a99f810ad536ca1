# SPDX-License-Identifier: Apache-2.0
"""The contexts that all arms of a run see: text as it stands, and text with planted constants and questions."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from .corpus import Corpus, Ids
from .planting import Constant, Planter, UnsupportedTokenizer

__all__ = ["ALIASES", "CONSTANTS", "DEPTHS", "Contexts", "Planted", "Question"]

DEPTHS = (0.1, 0.5, 0.9)  # of a single planted constant, as a fraction of the context
CONSTANTS, ALIASES = 4, 3  # planted together for `several` and `chained`


@dataclass(frozen=True)
class Question:
    """What is asked of a context, in tokens, and the task it counts for."""

    task: str
    question: list[int]
    answer: list[int]
    depth: float


@dataclass(frozen=True)
class Planted:
    """A context with planted constants, and the questions about them."""

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
    _planter: Planter | None = field(default=None, init=False)
    _drawn: dict[tuple[str, int], Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        begin = getattr(self.tokenizer, "bos_token_id", None)
        self.start = [begin] if begin is not None and self.tokenizer.encode("x")[:1] == [begin] else []

    @property
    def planter(self) -> Planter:
        """The planter for this vocabulary; raises UnsupportedTokenizer where there is none."""
        if self._planter is None:
            self._planter = Planter(self.tokenizer)
        return self._planter

    def unsupported_reason(self, lines: int, length: int) -> str | None:
        """Why ``lines`` lines cannot be planted in ``length`` tokens of this vocabulary, None if they can."""
        try:
            planter = self.planter
        except UnsupportedTokenizer as error:
            return str(error)
        needed = 4 * lines * (planter.question_size + planter.answer_size)
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

    def single(self, length: int) -> list[Planted]:
        """Contexts of ``length`` tokens with one constant, at each depth in turn."""
        return self._planted("needle", length, self._one)

    def crowded(self, length: int) -> list[Planted]:
        """Contexts of ``length`` tokens with several constants and aliases of some of them."""
        return self._planted("several", length, self._many)

    def _planted(
        self,
        task: str,
        length: int,
        make: Callable[[int, Generator], tuple[list[list[int]], list[float], list[Question]]],
    ) -> list[Planted]:
        key = (task, length)
        if key not in self._drawn:
            rng = self.rng(task, length)
            plans = [make(i, rng) for i in range(self.samples)]
            windows = self.corpus.windows(length, self.samples, rng)
            self._drawn[key] = [
                self._compose(window.ids, window.text, window.overlaps, length, *plan)
                for window, plan in zip(windows, plans, strict=True)
            ]
        drawn: list[Planted] = self._drawn[key]
        return drawn

    def _compose(
        self, ids: Ids, text: str, overlaps: bool, length: int, lines: list[list[int]], depths: list[float],
        questions: list[Question],
    ) -> Planted:  # fmt: skip
        body = ids[: length - len(self.start) - sum(map(len, lines))]
        whole = np.concatenate([np.array(self.start, np.int64), self.planter.plant(body, lines, depths)])
        return Planted(whole, text, questions, overlaps)

    def _one(self, index: int, rng: Generator) -> tuple[list[list[int]], list[float], list[Question]]:
        constant = self.planter.draw(1, rng)[0]
        depth = DEPTHS[index % len(DEPTHS)]
        question = Question("needle", *self.planter.ask(constant.name, constant.value), depth)
        return [self.planter.line(constant.name, constant.value)], [depth], [question]

    def _many(self, index: int, rng: Generator) -> tuple[list[list[int]], list[float], list[Question]]:
        del index
        planter = self.planter
        constants = planter.draw(CONSTANTS, rng)
        aliases: list[tuple[str, Constant]] = []
        for target in constants[:ALIASES]:
            taken = [c.name for c in constants] + [name for name, _ in aliases]
            aliases.append((planter.draw_alias(target, taken, rng), target))
        places = sorted(rng.uniform(0.02, 0.95, CONSTANTS + ALIASES))
        rank = rng.permutation(CONSTANTS + ALIASES)
        for i in range(ALIASES):  # an alias stands after its constant, as a program would have it
            rank[[i, CONSTANTS + i]] = sorted(rank[[i, CONSTANTS + i]])
        depths = [float(places[r]) for r in rank]
        lines = [planter.line(c.name, c.value) for c in constants]
        lines += [planter.line(name, target.name) for name, target in aliases]
        questions = [
            Question("several", *planter.ask(c.name, c.value), depth)
            for c, depth in zip(constants, depths[:CONSTANTS], strict=True)
        ]
        questions += [
            Question("chained", *planter.ask(name, f"{target.name} == {target.value}"), depth)
            for (name, target), depth in zip(aliases, depths[CONSTANTS:], strict=True)
        ]
        return lines, depths, questions
