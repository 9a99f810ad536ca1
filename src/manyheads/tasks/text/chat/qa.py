# SPDX-License-Identifier: Apache-2.0
"""Question answering: facts of people in a passage, one kind of answer each, so that code can tell a right one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from ....experiment.rows import Metric, Value
from ....experiment.task import RunContext
from .._answered import Asked, Judge, Query, written
from .._scores import names_only
from ._chat import ChatTask, said

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["FACTS", "QuestionAnswering", "person"]

_FIRST = (
    "Ada Bruno Clara Dario Edith Felix Greta Hugo Irene Jonas Karin Luca Mira Nils Olga Pavel Rosa Simon Tilda Viktor"
)
_LAST = (
    "Albrecht Bergman Castell Dvorak Eriksen Fontana Galvao Horvat Ibsen Jansen Kovacs Lindgren Marchetti Novak Olsen "
    "Petrov Quiroga Rossi Santos Tanaka Ueda Varga Weber Zielinski"
)
# What is told of a person: kind, sentence, question, and the values that it can have.
FACTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "city", "{who} was born in {what}.", "In which city was {who} born?",
        tuple("Lisbon Oslo Vienna Dublin Athens Prague Madrid Warsaw Helsinki Naples Geneva Hamburg".split()),
    ),
    (
        "job", "{who} works as a {what}.", "What does {who} work as?",
        tuple("baker surgeon carpenter teacher lawyer gardener pilot tailor chemist journalist".split()),
    ),
    (
        "instrument", "In the evening {who} plays the {what}.", "Which instrument does {who} play?",
        tuple("violin flute trumpet cello harp guitar clarinet piano drums accordion".split()),
    ),
    (
        "pet", "At home {who} keeps a {what}.", "Which animal does {who} keep at home?",
        tuple("parrot tortoise rabbit hamster goldfish ferret canary lizard cat dog".split()),
    ),
)  # fmt: skip
ASKED = 4  # questions of a passage, one of each kind
_INTRO = "Read this passage about some people.\n\n"
_QUESTION = "Answer by the passage above. {}"


def person(rng: Generator) -> tuple[str, ...]:
    """A value of every kind of fact."""
    return tuple(str(rng.choice(values)) for _, _, _, values in FACTS)


def names(rng: Generator, count: int) -> list[str]:
    """``count`` names of people that differ; there are 480."""
    first, last = _FIRST.split(), _LAST.split()
    drawn = rng.choice(len(first) * len(last), count, replace=False)
    return [f"{first[i % len(first)]} {last[i // len(first)]}" for i in drawn]


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(ChatTask):
    """The passage is made up, for nothing else has answers that code can judge without doubt: a reply is right if it
    names the value and no other value of its kind. Guessing gets 1 in 10 to 12; picking one that the passage has, no
    more where many people are told of. A passage has four questions, none of which sees another.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("answered", "questions answered", higher=True, kind="share", floor=0.5),
    )
    lengths: tuple[int, ...] = (512,)
    reply: int = 32

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng = self.draws(run, length, sample)
        most = min(20 * 24 - ASKED, length // 8)
        people = names(rng, most + ASKED)
        facts = [person(rng) for _ in people]
        depths = rng.uniform(0, 1, ASKED)

        def write(n: int) -> list[Asked]:
            # The people that are asked for come first in the list, and stand at their depths in the passage.
            order = sorted(range(ASKED + n), key=lambda i: depths[i] if i < ASKED else (i - ASKED + 0.5) / n)
            told = " ".join(
                sentence.format(who=people[i], what=facts[i][j])
                for i in order for j, (_, sentence, _, _) in enumerate(FACTS)
            )  # fmt: skip
            heads, queries = set[str](), list[Query]()
            for i, (kind, _, question, values) in enumerate(FACTS):
                asked = _QUESTION.format(question.format(who=people[i]))
                head, tail = written(run, [said("user", f"{_INTRO}{told}\n\n{asked}")], asked)
                others = [value for value in values if value != facts[i][i]]
                at: dict[str, Value] = {"kind": kind, "depth": round(float(depths[i]), 3)}
                queries.append(Query(tail, (Judge("answered", partial(names_only, facts[i][i], others), at),)))
                heads.add(head)
            (head,) = heads
            return [Asked((head,), tuple(queries), "people")]

        return self.filled(run, length, write, most)
