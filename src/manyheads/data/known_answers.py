# SPDX-License-Identifier: Apache-2.0
"""Questions whose answers code can tell: sums, gaps in articles, facts that a context plants, changes or lacks.

Three kinds, each of several levels, so that a small model gets some of every kind right:

- ``arithmetic``: a sum, a difference or a product, by its digits. Nothing but the question supports the answer.
- ``cloze``: a passage of an article that ends before a name or a number. ``supported``: it stands in the passage;
  ``unsupported``: it does not, and neither does anything else that would tell it.
- ``facts``: who lives where, among a few sentences about others. ``planted``: the context says it; ``against``: what it
  says is against what is known of the world (the capital of France); ``absent``: it says it of others only, so that
  whatever place is named is made up, and only an answer that names none is right.

The answer is begun for the model (``67 + 6 =``), so that its first word says what it holds to be so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .knowledge import NAMES, SETS
from .texts import Text

__all__ = ["KINDS", "Question", "known_answers", "right"]

KINDS = {
    "arithmetic": ("1+1 digits", "2+1 digits", "2+2 digits", "2-1 digits", "1x1 digits"),
    "cloze": ("supported", "unsupported"),
    "facts": ("planted", "against", "absent"),
}
_WORDS = (40, 75)  # of a passage before its gap, at least and at most
_GAPS = 4  # of a level, of an article
_OTHERS = 2  # sentences about others
_SENTENCE = re.compile(r"(?<=[.!?]) +")
_NO_NAMES = {"The", "A", "An", "In", "On", "At", "He", "She", "It", "They", "This", "His", "Her", "Its", "There"}


@dataclass(frozen=True)
class Question:
    """A question with what answers it.

    Attributes:
        text: of the user's message, the source included.
        answers: any of them is right; none where only not to answer is.
        source: the part of ``text`` that has to support the answer; all of it where empty.
        wrong: what an answer must not name.
        opening: what the model's answer begins with, written for it.
        words: of an answer that count; 0 for all.
        kind, level: of :data:`KINDS`.
        origin: what it shares with others that are not independent of it: the article.
    """

    text: str
    answers: tuple[str, ...]
    source: str = ""
    wrong: tuple[str, ...] = ()
    opening: str = ""
    words: int = 0
    kind: str = "questions"
    level: str = ""
    origin: str = ""


def right(question: Question, answer: str) -> bool:
    """Whether ``answer`` names one of the answers as a word of its own, and nothing that is wrong.

    Without answers: whether it names nothing that is wrong.
    """

    def named(word: str) -> bool:
        return bool(re.search(rf"(?<![\w.,-]){re.escape(word)}(?!\w|[.,]\d)", answer, re.IGNORECASE))

    if any(map(named, question.wrong)):
        return False
    return any(map(named, question.answers)) if question.answers else True


def known_answers(kind: str, count: int, rng: Any, texts: Sequence[Text] = ()) -> list[Question]:
    """``count`` questions of a kind, their levels in turn.

    Args:
        kind: of :data:`KINDS`.
        count: how many.
        rng: NumPy's generator of all draws.
        texts: articles, for ``cloze``: of each at most four gaps of a level.

    Raises:
        UserError: there is no such kind, or the texts have too few gaps.
    """
    if kind not in KINDS:
        raise UserError(f"there are no questions of the kind {kind!r}; there are {', '.join(KINDS)}")
    levels = KINDS[kind]
    if kind == "cloze":
        return _gaps(count, rng, texts)
    make = _sum if kind == "arithmetic" else _fact
    made: dict[str, Question] = {}
    for tried in range(50 * count):
        if len(made) == count:
            break
        question = make(levels[len(made) % len(levels)] if tried < 40 * count else levels[tried % len(levels)], rng)
        made.setdefault(question.text, question)
    return list(made.values())


def _sum(level: str, rng: Any) -> Question:
    digits, sign = re.findall(r"\d", level), level[1]
    a, b = (int(rng.integers(10 ** (int(n) - 1) + (n == "1"), 10 ** int(n))) for n in digits)
    value = {"+": a + b, "-": a - b, "x": a * b}[sign]
    sum_ = f"{a} {'*' if sign == 'x' else sign} {b}"
    return _asked(f"What is {sum_}?", str(value), f"{sum_} =", "arithmetic", level)


def _fact(level: str, rng: Any) -> Question:
    facts = SETS["capitals"].facts
    chosen = [facts[i] for i in rng.permutation(len(facts))[: _OTHERS + 2]]
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: _OTHERS + 1]]
    places = [place for _, place in chosen]
    wrong: tuple[str, ...] = ()
    if level == "against":
        (country, known), other = chosen[0], places[1]
        told = [f"The capital of {country} is {other}."]
        told += [f"The capital of {chosen[i][0]} is {places[(i + 1) % len(places)]}." for i in range(2, _OTHERS + 1)]
        asked, opening, answer, wrong = (
            f"what is the capital of {country}",
            f"The capital of {country} is",
            other,
            (known,),
        )
    else:
        told = [f"{name} lives in {place}." for name, place in zip(names[1:], places[1:], strict=False)]
        asked, opening, answer = f"where does {names[0]} live", f"{names[0]} lives in", places[0]
        if level == "planted":
            told.append(f"{names[0]} lives in {places[0]}.")
        else:
            answer, wrong = "", tuple(place for _, place in facts)
    source = " ".join(told[i] for i in rng.permutation(len(told)))
    text = f"{source}\n\nAccording to the text, {asked}? If it does not say, answer: unknown."
    return _asked(text, answer, opening, "facts", level, source, wrong)


def _asked(
    text: str, answer: str, opening: str, kind: str, level: str, source: str = "", wrong: tuple[str, ...] = ()
) -> Question:
    """A question that one word answers."""
    return Question(text, (answer,) if answer else (), source or text, wrong, opening, 1, kind, level)


def _gaps(count: int, rng: Any, texts: Sequence[Text]) -> list[Question]:
    """Passages with a gap, supported and unsupported ones in turn."""
    found: dict[str, list[Question]] = {level: [] for level in KINDS["cloze"]}
    each = -(-count // 2)
    for i in rng.permutation(len(texts)):
        here = dict.fromkeys(found, 0)
        for paragraph in texts[i].content.split("\n"):
            # The last of each level, so that passages of one paragraph are two at most.
            gaps = {} if paragraph.lstrip().startswith("=") else {gap.level: gap for gap in _gaps_of(paragraph)}
            for level, gap in gaps.items():
                if len(found[level]) < each and here[level] < _GAPS:
                    here[level] += 1
                    found[level].append(replace(gap, origin=texts[i].name))
        if all(len(some) == each for some in found.values()):
            return [found[level][n] for n in range(each) for level in KINDS["cloze"]][:count]
    fewest = min(map(len, found.values()))
    raise UserError(f"the texts have {2 * fewest} passages that end with a name or a number, not {count}; give more")


def _gaps_of(paragraph: str) -> Iterator[Question]:
    """A question for each sentence that ends with a name or a number, behind enough words."""
    plain = re.sub(r" ([.,;:!?)])", r"\1", re.sub(r" ?@([-,.])@ ?", r"\1", paragraph.strip()))
    sentences = _SENTENCE.split(plain)
    for i, sentence in enumerate(sentences):
        last = re.search(r"(?:^| )([A-Z][a-z]{2,}|\d[\d,]*)[.!?]$", sentence)
        if not last or last[1] in _NO_NAMES or "unk" in sentence:
            continue
        words, first = len(sentence.split()), i
        while first and words < _WORDS[0]:
            first -= 1
            words += len(sentences[first].split())
        if not (first < i and _WORDS[0] <= words <= _WORDS[1]):
            continue
        before, opening = " ".join(sentences[first:i]), sentence[: last.start()]
        level = "supported" if re.search(rf"\b{re.escape(last[1])}\b", f"{before} {opening}") else "unsupported"
        yield _asked(f"Go on with this text: {before}", last[1], opening, "cloze", level, before)
