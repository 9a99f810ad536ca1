# SPDX-License-Identifier: Apache-2.0
"""RULER cwe (common words extraction): the ten words that a numbered list holds most often are asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from ....errors import UserError
from ....experiment.rows import Metric
from ....experiment.task import RunContext
from .._answered import Asked, haystack
from ._ruler import RulerTask, metric

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["CommonWords"]

COMMON = 10
_INTRO = "Below is a numbered list of words, in which some words stand more often than others. Remember which.\n\n"
_QUESTION = f"What are the {COMMON} words that stand most often in the list above?"
_PREFIX = f"The {COMMON} words that stand most often in the list are:"
_LONG = 4096  # tokens from which on words stand 30 and 3 times, as in the paper; below, 6 times and once
_USUAL = 100  # most frequent words of the text, which are likely whatever the list says


def _list(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass(frozen=True, kw_only=True)
class CommonWords(RulerTask):
    """Ten words stand many times, all others a few; the words are drawn from the haystack's. A worked example of
    another list stands before, read with the context, as in the paper.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = metric("cwe")
    reply: int = 120

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng, known = self.draws(run, length, sample), self._words(run)
        often, seldom = (30, 3) if length >= _LONG else (6, 1)
        drawn = [known[i] for i in rng.permutation(len(known))]
        shown, common, others = drawn[: 2 * COMMON], drawn[2 * COMMON : 3 * COMMON], drawn[3 * COMMON :]
        example = self._mixed(rng, shown[:COMMON], 3, shown[COMMON:], 1)
        before = f"{_INTRO}{_list(example)}\n\n{_QUESTION}\n{_PREFIX} {', '.join(shown[:COMMON])}.\n\n{_INTRO}"
        seed = int(rng.integers(2**32))

        def write(n: int) -> str:
            return before + _list(self._mixed(run.rng(words=seed), common, often, others[:n], seldom))

        return self.fill(run, length, write, len(others), _QUESTION, _PREFIX, common)

    @staticmethod
    def _mixed(rng: Generator, common: list[str], often: int, others: list[str], seldom: int) -> list[str]:
        words = common * often + others * seldom
        return [words[i] for i in rng.permutation(len(words))]

    def _words(self, run: RunContext) -> list[str]:
        """Words of four to ten small letters that the haystack holds, but for its most frequent ones."""

        def make() -> list[str]:
            said = (word.strip(".,;:!?()\"'") for one in haystack(run, self.text).sentences for word in one.split())
            counts = Counter(
                word for word in said if 4 <= len(word) <= 10 and word.isascii() and word.isalpha() and word.islower()
            )
            known = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[_USUAL:]]
            if len(known) < 4 * COMMON:
                raise UserError(f"the text has too few different words for {self.name}; give more of it")
            return known

        return cast("list[str]", run.kept(("words", self.text), make))
