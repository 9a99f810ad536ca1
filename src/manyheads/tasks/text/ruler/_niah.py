# SPDX-License-Identifier: Apache-2.0
"""RULER's needles: sentences that say an access number or code, hidden in noise, prose or sentences like them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ....experiment.task import RunContext
from .._answered import Asked, haystack
from .._contexts import DEPTHS
from .._haystack import spread
from ._ruler import NOISE, RulerTask, names

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["NiahTask"]

_INTRO = (
    "Somewhere in the text below stand sentences that say an access {what}. Keep every access {what} in mind; you will "
    "be asked about them.\n\n"
)


def _codes(rng: Generator, count: int) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def _numbers(rng: Generator, count: int) -> list[str]:
    return [str(number) for number in 1_000_000 + rng.choice(9_000_000, count, replace=False)]


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


@dataclass(frozen=True, kw_only=True)
class NiahTask(RulerTask):
    """Base of the needles; the parameters are those of the paper's table of tasks."""

    hidden_in: ClassVar[Literal["noise", "prose", "needles"]] = "prose"
    keys: ClassVar[Literal["words", "code"]] = "words"
    values: ClassVar[Literal["number", "code"]] = "number"
    planted: ClassVar[int] = 1  # needles with a key of their own
    per_key: ClassVar[int] = 1  # values of each
    asks: ClassVar[int] = 1  # keys that are asked for, all at once

    reply: int = 128

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng, what = self.draws(run, length, sample), self.values
        most = length if self.hidden_in != "needles" else length // 8
        others = most if self.hidden_in == "needles" else 0
        drawn = _codes(rng, self.planted + others) if self.keys == "code" else names(rng, self.planted + others)
        keys = [key if self.keys == "code" else f"the {key}" for key in drawn]
        values = (_codes if what == "code" else _numbers)(rng, (self.planted + others) * self.per_key)
        one = f"One of the access {what}s" if self.per_key > 1 else f"The access {what}"
        said = [f"{one} of {keys[i // self.per_key]} is {value}." for i, value in enumerate(values)]
        needles = said[: self.planted * self.per_key]
        alone = len(needles) == 1
        depths = [DEPTHS[sample % len(DEPTHS)]] if alone else sorted(rng.uniform(0.02, 0.98, len(needles)))
        order = rng.permutation(len(needles))
        body, text = self._body(run, rng, most, said[len(needles) :])

        def write(n: int) -> str:
            return _INTRO.format(what=what) + " ".join(spread(body(n), [needles[i] for i in order], depths))

        asked = keys[: self.asks]
        answers = values[: self.asks * self.per_key]
        several = len(answers) > 1
        subject = f"{'all the access' if several else 'the access'} {what}{'s' * several} of {_listed(asked)}"
        verb = "are" if several else "is"
        return self.fill(
            run, length, write, most, f"What {verb} {subject} that the text above says?",
            f"{subject[0].upper()}{subject[1:]} that the text above says {verb}", answers,
            {"depth": float(depths[0])} if alone else {}, text,
        )  # fmt: skip

    def _body(
        self, run: RunContext, rng: Generator, most: int, others: list[str]
    ) -> tuple[Callable[[int], list[str]], str]:  # fmt: skip
        """What the needles are hidden in, as so many sentences, and the name of its text."""
        if self.hidden_in == "noise":
            return lambda n: [NOISE[i % len(NOISE)] for i in range(n)], "noise"
        if self.hidden_in == "needles":
            return lambda n: others[:n], "needles"
        sentences, text = haystack(run, self.text).drawn(rng, most)
        return lambda n: sentences[:n], text
