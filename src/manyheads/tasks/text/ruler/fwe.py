# SPDX-License-Identifier: Apache-2.0
"""RULER fwe (frequent words extraction): the three made-up words that a coded text holds most often are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....experiment.rows import Metric
from ....experiment.task import RunContext
from .._answered import Asked
from ._ruler import RulerTask, letters, metric

__all__ = ["FrequentWords"]

WORDS = 3
_ZETA = 1.6449340668482264  # of 2
_LEAST = 100  # words of the shortest text: the third and the fourth differ in number
_INTRO = "Below is a coded text. Leave the dots aside, and note how often each coded word stands in it.\n\n"
_QUESTION = f"Which {WORDS} coded words stand most often in the text above? Leave the dots aside."
_PREFIX = f"The {WORDS} coded words that stand most often are:"


def counts(words: int) -> list[int]:
    """How often the word of each rank stands, dots first, by a zeta distribution of exponent 2, as in the paper."""
    expected = [words / (_ZETA * rank * rank) for rank in range(1, words + 1)]
    return [round(x) for x in expected if round(x)]


@dataclass(frozen=True, kw_only=True)
class FrequentWords(RulerTask):
    """Dots are the most frequent; the three words behind them are expected."""

    metrics: ClassVar[tuple[Metric, ...]] = metric("fwe")
    reply: int = 50

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng = self.draws(run, length, sample)
        coded, seed = ["...", *letters(rng, len(counts(_LEAST + length)), 6)], int(rng.integers(2**32))

        def write(n: int) -> str:
            numbers = counts(_LEAST + n)
            words = [word for word, count in zip(coded, numbers, strict=False) for _ in range(count)]
            return _INTRO + " ".join(words[i] for i in run.rng(words=seed).permutation(len(words)))

        return self.fill(run, length, write, length, _QUESTION, _PREFIX, coded[1 : 1 + WORDS], text="coded")
