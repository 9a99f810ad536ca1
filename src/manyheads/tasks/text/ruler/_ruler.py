# SPDX-License-Identifier: Apache-2.0
"""What the tasks of RULER share: a context that fills a length, a question behind it, the share of answers found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ....experiment.rows import Metric, Value
from ....experiment.task import RunContext
from .._answered import AnsweredTask, Asked, Judge, Query, size, written
from .._haystack import fitted
from .._needles import QUALITIES, THINGS
from .._scores import found

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["NOISE", "RulerTask", "letters", "metric", "names"]

NOISE = ("The road is long.", "The hill is steep.", "The river is slow.", "On it goes.", "Round and round again.")


def metric(title: str) -> tuple[Metric, ...]:
    """The metric of a task: the share of its answers that stand in the reply. Guessing finds next to none."""
    return (Metric("found", title, higher=True, kind="share", floor=0.5),)


def names(rng: Generator, count: int) -> list[str]:
    """``count`` names that differ, of two words, or of three where there are not enough of two."""
    parts = (QUALITIES, THINGS) if count <= len(QUALITIES) * len(THINGS) else (QUALITIES, QUALITIES, THINGS)
    shape = [len(part) for part in parts]
    drawn = np.unravel_index(rng.choice(prod(shape), count, replace=False), shape)
    return [" ".join(part[i] for part, i in zip(parts, row, strict=True)) for row in zip(*drawn, strict=True)]


def letters(rng: Generator, count: int, size: int) -> list[str]:
    """``count`` words that differ, of ``size`` random small letters."""
    drawn = dict.fromkeys("".join(map(chr, row)) for row in 97 + rng.integers(0, 26, (2 * count + 8, size)))
    return list(drawn)[:count]


@dataclass(frozen=True, kw_only=True)
class RulerTask(AnsweredTask):
    """Base: the reply goes on behind the words that begin the answer, as RULER has it."""

    def fill(
        self, run: RunContext, length: int, write: Callable[[int], str], most: int, question: str, prefix: str,
        answers: Sequence[str], at: Mapping[str, Value] | None = None, text: str = "",
        judge: Callable[[Sequence[str], str], float] = found,
    ) -> list[Asked]:  # fmt: skip
        """The context ``write(n)`` with the largest ``n <= most`` that fits, and the question behind it."""
        judges = (Judge("found", partial(judge, answers), at or {}),)

        def asked(n: int) -> Asked:
            message = {"role": "user", "content": f"{write(n)}\n\n{question}"}
            head, tail = written(run, [message], question, prefix)
            return Asked((head,), (Query(tail, judges, settled=True),), text)

        return [fitted(asked, partial(size, run), length, most)]
