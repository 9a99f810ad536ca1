# SPDX-License-Identifier: Apache-2.0
"""Question answering: facts of people between the sentences of a text, such that code can tell a right answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from ....errors import UserError
from ....experiment.rows import Metric, Value
from ....experiment.task import RunContext
from .._answered import Asked, Judge, Query, written
from .._choices import Choice
from .._haystack import spread
from .._scores import names_only
from ._chat import ChatTask, said

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["ASKED", "FACTS", "QuestionAnswering", "names", "question", "values"]

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
ASKED = 4  # questions of a passage, one of each kind, about as many people
_TOKENS = 256  # of a passage for each person
_INTRO = "Read this text. It also tells of some people.\n\n"
_QUESTION = "Answer by the text above. {}"


def opening(kind: int, who: str) -> str:
    """The sentence of a fact to where its value comes."""
    return FACTS[kind][1].partition(" {what}")[0].format(who=who)


def values(rng: Generator, kind: int, count: int) -> list[str]:
    """A value for each of ``count`` people; the first :data:`ASKED` have values of their own, which differ."""
    drawn = [str(value) for value in rng.permutation(FACTS[kind][3])]
    others = rng.integers(ASKED, len(drawn), max(0, count - ASKED))
    return [*drawn[:ASKED], *(drawn[i] for i in others)][:count]


def question(kind: int, who: str, told: Sequence[str], at: Mapping[str, Value], metrics: tuple[str, str]) -> tuple[
    str, Judge, Choice
]:  # fmt: skip
    """What is asked about a person whose value is the first of ``told``: the question, and both ways to judge.

    The candidates are the values of all who are asked about, each told of someone; the reply begins as the passage
    says it.
    """
    others = [value for value in FACTS[kind][3] if value != told[0]]
    choice = Choice(metrics[0], tuple(f" {value}" for value in told), opening=opening(kind, who), at=at)
    return FACTS[kind][2].format(who=who), Judge(metrics[1], partial(names_only, told[0], others), at), choice


def names(rng: Generator, count: int) -> list[str]:
    """``count`` names of people that differ; there are 480."""
    first, last = _FIRST.split(), _LAST.split()
    drawn = rng.choice(len(first) * len(last), count, replace=False)
    return [f"{first[i % len(first)]} {last[i // len(first)]}" for i in drawn]


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(ChatTask):
    """The people are made up, for nothing else has answers that code can judge without doubt; four facts of each stand
    together between the sentences of a text. A passage has four questions about four people, none of which sees
    another.

    ``chosen`` needs no reply: of the values that the four have, the right one is the likeliest behind the beginning of
    the passage's own sentence, by the log-likelihood of a byte. ``answered`` is of the written reply, which is right
    if it names the value and no other of its kind. Guessing gets a quarter of either: one of what the four have.

    Attributes:
        people: that the passage tells of; 0 for one in 256 tokens, at least four. Each further one is one more that a
            model can take for another.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("chosen", "right answer chosen of 4", higher=True, kind="share", floor=1 / ASKED),
        Metric("answered", "questions answered", higher=True, kind="share", floor=1 / ASKED),
    )
    lengths: tuple[int, ...] = (512,)
    people: int = 0
    reply: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.people and not ASKED <= self.people <= 480:
            raise UserError(f"people is {ASKED} to 480, as many are asked about, or 0 for a number by length")

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng = self.draws(run, length, sample)
        people = names(rng, self.people or min(480, max(ASKED, length // _TOKENS)))
        told = [values(rng, kind, len(people)) for kind in range(len(FACTS))]
        # Who is first in the list is asked about; of whose kind is drawn, so that no kind goes with a value.
        kinds = [int(kind) for kind in rng.permutation(len(FACTS))]
        depths = rng.uniform(0, 1, len(people))
        lives = [
            " ".join(said.format(who=who, what=told[kind][i]) for kind, (_, said, _, _) in enumerate(FACTS))
            for i, who in enumerate(people)
        ]
        sentences, text = self.passage(run, length, sample)

        def write(n: int) -> list[Asked]:
            passage = " ".join(spread(sentences[:n], lives, depths.tolist()))
            heads, queries = set[str](), list[Query]()
            for i, kind in enumerate(kinds):
                at: dict[str, Value] = {"kind": FACTS[kind][0], "depth": round(float(depths[i]), 3)}
                mine = [told[kind][i], *(told[kind][j] for j in range(ASKED) if j != i)]
                asks, judge, choice = question(kind, people[i], mine, at, ("chosen", "answered"))
                asks = _QUESTION.format(asks)
                head, tail = written(run, [said("user", f"{_INTRO}{passage}\n\n{asks}")], asks)
                queries.append(Query(tail, (judge,), choices=(choice,)))
                heads.add(head)
            (head,) = heads
            return [Asked((head,), tuple(queries), text)]

        return self.filled(run, length, write, len(sentences))
