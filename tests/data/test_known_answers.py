# SPDX-License-Identifier: Apache-2.0
"""Questions: their answers are right, their sources support them or do not, and a judge sees the difference."""

import re

import numpy as np
import pytest

from manyheads.data.known_answers import KINDS, Question, known_answers, right
from manyheads.data.texts import Text
from manyheads.errors import UserError

FILLER = "Many people had come to see the new bridge over the wide river on that day, and some of them stayed. " * 2
PAIRS = "Brown Leeds, Clark York, Dixon Bath, Evans Derby, Foster Truro"
ARTICLES = [
    Text(
        f"article {name}",
        f" = Title = \n\n {FILLER}The mayor {name} spoke. In the end all of them went to thank {name}. \n"
        f" {FILLER}The mayor of number {i} spoke. In the end all of them walked back to {place}. \n",
    )
    for i, (name, place) in enumerate(pair.split() for pair in PAIRS.split(", "))
]


def asked(kind, count=24, seed=0):
    return known_answers(kind, count, np.random.default_rng(seed), ARTICLES)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_have_every_level_and_are_repeatable(kind):
    count = 8 if kind == "cloze" else 30
    found = asked(kind, count)
    assert len(found) == len({q.text + q.opening for q in found}) == count and found == asked(kind, count)
    assert {q.level for q in found} == set(KINDS[kind]) and {q.kind for q in found} == {kind}
    assert found != asked(kind, count, 1)
    assert all(q.source in q.text and right(q, f" {q.answers[0]}.") for q in found if q.answers)
    assert not any(right(q, " nothing of the kind") for q in found if q.answers)


def test_sums_are_right():
    for q in asked("arithmetic"):
        a, sign, b = q.opening.removesuffix(" =").split()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert q.answers == (str(value),) and not right(q, f" {value}0") and not right(q, f" -{value}")
        assert not right(q, f" {value}.5") and right(q, f" {value}.") and not right(q, f" 1{value}")


def test_sources_support_what_they_should():
    for q in asked("cloze", 8):
        known = q.answers[0] in q.source
        assert known == (q.level == "supported") and q.origin.startswith("article")
        assert len(f"{q.source} {q.opening}".split()) >= 40 and not q.opening.endswith(q.answers[0])
    for q in asked("facts", 60):
        name = re.search(r"(?:where does|capital of) (\w+)", q.text.split("\n\n")[1])[1]
        if q.level == "absent":
            assert name not in q.source and not q.answers and right(q, " unknown") and not right(q, " Paris")
        else:
            says = f"{name} lives in" if q.level == "planted" else f"The capital of {name} is"
            assert f"{says} {q.answers[0]}." in q.source
        if q.level == "against":  # what is known of the world is wrong here, and stands nowhere
            assert q.wrong and q.wrong[0] not in q.source and not right(q, f" {q.wrong[0]}")
            assert not right(q, f" {q.answers[0]}, not {q.wrong[0]}")


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(UserError, match="arithmetic, cloze, facts"):
        asked("riddles")
    with pytest.raises(UserError, match="passages that end"):
        asked("cloze", 400)
    assert right(Question("Who?", ("Ann", "Bob")), "It was bob.") and not right(Question("Who?", ("Ann",)), "Anna")
