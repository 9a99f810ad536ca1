# SPDX-License-Identifier: Apache-2.0
"""Scores of a reply, in [0, 1], that code alone decides."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["any_found", "found", "in_order", "names_only", "overlap", "words"]


def words(text: str) -> list[str]:
    """Words of ``text`` in lower case: runs of letters and digits."""
    return re.findall(r"\w+", text.lower())


def found(answers: Sequence[str], reply: str) -> float:
    """Share of ``answers`` that stand in ``reply``, upper and lower case alike: all are expected."""
    return sum(answer.lower() in reply.lower() for answer in answers) / len(answers)


def any_found(answers: Sequence[str], reply: str) -> float:
    """1 if one of ``answers``, wordings of the same answer, stands in ``reply``, else 0; upper and lower case alike."""
    return float(any(answer.lower() in reply.lower() for answer in answers))


def names_only(answer: str, others: Sequence[str], reply: str) -> float:
    """1 if the words of ``answer`` stand in ``reply`` and those of none of ``others`` do, else 0.

    A reply that lists all that the answer could be is no answer.
    """
    said = f" {' '.join(words(reply))} "
    named = {one for one in (answer, *others) if f" {' '.join(words(one))} " in said}
    return float(named == {answer})


def in_order(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of words."""
    above = [0] * (len(two) + 1)
    for word in one:
        row = [0]
        for i, other in enumerate(two):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
        above = row
    return above[-1]


def overlap(reply: str, text: str) -> float:
    """Share of the words of ``text`` that ``reply`` has in the same order, gaps allowed (the recall of ROUGE-L)."""
    wanted = words(text)
    return in_order(words(reply), wanted) / len(wanted)
