# SPDX-License-Identifier: Apache-2.0
"""Rules that a reply keeps or does not keep, which code decides; the kinds are IFEval's (arXiv 2311.07911)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._scores import words

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["KINDS", "Rule", "draw"]

_WORDS = "amber basket compass feather harbor kettle lantern meadow orchard pebble saddle thunder velvet walnut".split()


@dataclass(frozen=True)
class Rule:
    """A rule: its kind, how it is said, and whether a reply keeps it. An empty reply keeps none."""

    kind: str
    text: str
    check: Callable[[str], bool]

    def kept(self, reply: str) -> bool:
        """Whether ``reply`` keeps it."""
        return bool(reply.strip()) and self.check(reply.strip())


def _lower(rng: Generator) -> Rule:
    return Rule("lower", "Write in small letters only, without any capital letter.", str.islower)


def _upper(rng: Generator) -> Rule:
    return Rule("upper", "Write in capital letters only, without any small letter.", str.isupper)


def _contains(rng: Generator) -> Rule:
    word = str(rng.choice(_WORDS))
    return Rule("contains", f'Use the word "{word}" in your reply.', lambda reply: word in words(reply))


def _begins(rng: Generator) -> Rule:
    word = str(rng.choice(_WORDS))
    return Rule(
        "begins", f'Let "{word}" be the very first word of your reply.', lambda reply: words(reply)[:1] == [word]
    )


def _ends(rng: Generator) -> Rule:
    word = str(rng.choice(_WORDS))
    return Rule("ends", f'Let "{word}" be the very last word of your reply.', lambda reply: words(reply)[-1:] == [word])


def _bullets(rng: Generator) -> Rule:
    count = int(rng.integers(2, 5))
    return Rule(
        "bullets", f'Reply with a list of exactly {count} lines, each of which begins with "* ".',
        lambda reply: [line.startswith("* ") for line in reply.splitlines() if line.strip()] == [True] * count,
    )  # fmt: skip


def _quotes(rng: Generator) -> Rule:
    return Rule(
        "quotes", "Put your whole reply in double quotation marks.",
        lambda reply: len(reply) > 1 and reply[0] + reply[-1] in ('""', "\u201c\u201d"),
    )  # fmt: skip


def _title(rng: Generator) -> Rule:
    return Rule(
        "title", "Give your reply a title in double angle brackets, as in <<title>>.",
        lambda reply: re.search(r"<<[^<>\n]+>>", reply) is not None,
    )  # fmt: skip


def _no_comma(rng: Generator) -> Rule:
    return Rule("no comma", "Do not use any comma.", lambda reply: "," not in reply)


_MAKERS: dict[str, Callable[[Generator], Rule]] = {
    "lower": _lower, "upper": _upper, "contains": _contains, "begins": _begins, "ends": _ends, "bullets": _bullets,
    "quotes": _quotes, "title": _title, "no comma": _no_comma,
}  # fmt: skip
# What cannot be kept together, because of one another's letters or places.
_APART = ({"lower", "upper"}, {"begins", "bullets", "quotes", "title"}, {"ends", "quotes"})
KINDS = tuple(_MAKERS)


def draw(rng: Generator, count: int) -> list[Rule]:
    """``count`` rules of different kinds that a reply can keep together, in random order."""
    kinds = list[str]()
    for i in rng.permutation(len(KINDS)):
        kind = KINDS[i]
        if len(kinds) < count and not any(kind in group and group & set(kinds) for group in _APART):
            kinds.append(kind)
    return [_MAKERS[kind](rng) for kind in kinds]
