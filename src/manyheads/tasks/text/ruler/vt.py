# SPDX-License-Identifier: Apache-2.0
"""RULER vt (variable tracking): all names that a number was passed on to, sentence by sentence, are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from ....experiment.rows import Metric
from ....experiment.task import RunContext
from .._answered import Asked
from .._haystack import spread
from ._ruler import NOISE, RulerTask, letters, metric

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["VariableTracking"]

HOPS = 4
_INTRO = "The sentences below set variables. A variable that is set to another one takes over its value.\n\n"
_EXAMPLE = 10  # sentences of noise in the example


def _chain(rng: Generator) -> tuple[str, list[str], list[str]]:
    """A value, the variables that hold it, and the sentences that say so."""
    value = str(rng.integers(10_000, 100_000))
    held = [name.upper() for name in letters(rng, HOPS + 1, 5)]
    said = [f"Variable {held[0]} is set to {value}."]
    said += [f"Variable {b} is set to variable {a}." for a, b in pairwise(held)]
    return value, held, said


def _noise(n: int) -> list[str]:
    return [NOISE[i % len(NOISE)] for i in range(n)]


@dataclass(frozen=True, kw_only=True)
class VariableTracking(RulerTask):
    """One chain of five names in noise, in order; all five are expected. A short worked example stands before, read
    with the context, as in the paper.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = metric("vt")
    reply: int = 48

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng = self.draws(run, length, sample)
        shown = _chain(rng)
        (value, held, said), depths = _chain(rng), sorted(rng.uniform(0, 1, HOPS + 1))
        question = "Name all the variables that hold the value {0} in the text above."
        prefix = f"The {HOPS + 1} variables that hold the value {{0}} are"
        example = " ".join(spread(_noise(_EXAMPLE), shown[2], [i / HOPS for i in range(HOPS + 1)]))
        before = (
            f"{_INTRO}{example}\n\n{question.format(shown[0])}\n{prefix.format(shown[0])} {', '.join(shown[1])}.\n\n"
        )

        def write(n: int) -> str:
            return before + _INTRO + " ".join(spread(_noise(n), said, depths))

        return self.fill(run, length, write, length, question.format(value), prefix.format(value), held, text="noise")
