# SPDX-License-Identifier: Apache-2.0
"""Rules that a reply keeps or does not keep, which code decides; the kinds are IFEval's (arXiv 2311.07911).

Of every kind there are several rules of one form, which differ in one thing: a word, a mark, small or capital letters.
So there are two replies that differ in it alone, of which one keeps the rule and the other would keep its twin: who
does not know which of the two was said prefers the right one in half of the cases.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .._scores import words

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["KINDS", "Rule", "draw"]

_WORDS = "amber basket compass feather harbor kettle lantern meadow orchard pebble saddle thunder velvet walnut".split()
_PLACE, _PEOPLE = "It tells of a place", "of the people who live there"  # what may be said of any text
_REPLY = f"{_PLACE} and {_PEOPLE}"
_CASES = {"small": str.lower, "capital": str.upper}
_QUOTES = {"double quotation marks": '""', "square brackets": "[]", "round brackets": "()"}
_TITLES = {
    "double angle brackets, as in <<title>>": ("<<", ">>"), "double square brackets, as in [[title]]": ("[[", "]]"),
}  # fmt: skip
_MARKS = {"comma": ",", "semicolon": ";"}


@dataclass(frozen=True)
class Rule:
    """A rule: its kind, how it is said, and whether a reply keeps it. An empty reply keeps none.

    Attributes:
        replies: one that keeps it, and one that differs from it in what the rule is about and does not.
    """

    kind: str
    text: str
    check: Callable[[str], bool]
    replies: tuple[str, str]

    def kept(self, reply: str) -> bool:
        """Whether ``reply`` keeps it."""
        return bool(reply.strip()) and self.check(reply.strip())


@dataclass(frozen=True)
class _Form:
    """Rules of one kind, made from one of ``options`` each: what is said, what is looked for, a reply that keeps it."""

    options: tuple[str, ...]
    text: Callable[[str], str]
    check: Callable[[str, str], bool]
    reply: Callable[[str], str]


def _enclosed(reply: str, marks: str) -> bool:
    ends = [marks, "\u201c\u201d"] if marks == '""' else [marks]
    return len(reply) > 1 and reply[0] + reply[-1] in ends


def _titled(reply: str, marks: tuple[str, str]) -> bool:
    before, after = map(re.escape, marks)
    return re.search(f"{before}[^<>\\[\\]\\n]+{after}", reply) is not None


def _listed(reply: str, option: str) -> bool:
    count, mark = int(option[0]), option[1:]
    return [line.startswith(f"{mark} ") for line in reply.splitlines() if line.strip()] == [True] * count


def _listing(option: str) -> str:
    lines = (_PLACE, _PEOPLE, "of the land", "of old days")[: int(option[0])]
    return "\n".join(f"{option[1:]} {line}" for line in lines)


_FORMS: dict[str, _Form] = {
    "case": _Form(
        tuple(_CASES), lambda x: f"Write your whole reply in {x} letters only.",
        lambda x, reply: reply == _CASES[x](reply) != reply.swapcase(), lambda x: _CASES[x](f"{_REPLY}."),
    ),
    "contains": _Form(
        tuple(_WORDS), lambda x: f'Use the word "{x}" in your reply.', lambda x, reply: x in words(reply),
        lambda x: f"{_REPLY}, and of the {x} in it.",
    ),
    "begins": _Form(
        tuple(_WORDS), lambda x: f'Let "{x}" be the very first word of your reply.',
        lambda x, reply: words(reply)[:1] == [x], lambda x: f"{x.capitalize()}: {_REPLY[0].lower()}{_REPLY[1:]}.",
    ),
    "ends": _Form(
        tuple(_WORDS), lambda x: f'Let "{x}" be the very last word of your reply.',
        lambda x, reply: words(reply)[-1:] == [x], lambda x: f"{_REPLY}: {x}.",
    ),
    "bullets": _Form(
        tuple(f"{count}{mark}" for count in (2, 3, 4) for mark in "*-"),
        lambda x: f'Reply with a list of exactly {x[0]} lines, each of which begins with "{x[1:]} ".',
        lambda x, reply: _listed(reply, x), _listing,
    ),
    "enclosed": _Form(
        tuple(_QUOTES), lambda x: f"Put your whole reply in {x}.", lambda x, reply: _enclosed(reply, _QUOTES[x]),
        lambda x: f"{_QUOTES[x][0]}{_REPLY}.{_QUOTES[x][1]}",
    ),
    "title": _Form(
        tuple(_TITLES), lambda x: f"Give your reply a title in {x}.", lambda x, reply: _titled(reply, _TITLES[x]),
        lambda x: f"{_TITLES[x][0]}A place{_TITLES[x][1]}\n{_REPLY}.",
    ),
    "without": _Form(
        tuple(_MARKS), lambda x: f"Do not use any {x}.", lambda x, reply: _MARKS[x] not in reply,
        lambda x: f"{_PLACE}{next(mark for name, mark in _MARKS.items() if name != x)} {_PEOPLE}.",
    ),
}  # fmt: skip
# What cannot be kept together, because of one another's letters or places.
_APART = ({"begins", "bullets", "enclosed", "title"}, {"ends", "enclosed"})
KINDS = tuple(_FORMS)


def draw(rng: Generator, count: int) -> list[Rule]:
    """``count`` rules of different kinds that a reply can keep together, in random order."""
    kinds = list[str]()
    for i in rng.permutation(len(KINDS)):
        kind = KINDS[i]
        if len(kinds) < count and not any(kind in group and group & set(kinds) for group in _APART):
            kinds.append(kind)
    return [_made(kind, rng) for kind in kinds]


def _made(kind: str, rng: Generator) -> Rule:
    form = _FORMS[kind]
    option = str(rng.choice(form.options))
    # Of lists the mark differs and not the number of lines, which would change the length of a reply.
    others = [x for x in form.options if x != option and (kind != "bullets" or x[0] == option[0])]
    twin = str(rng.choice(others))
    return Rule(kind, form.text(option), partial(form.check, option), (form.reply(option), form.reply(twin)))
