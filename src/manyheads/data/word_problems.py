# SPDX-License-Identifier: Apache-2.0
"""Word problems with worked answers: GSM8K's test part, or sums of our own where nothing is to be downloaded."""

from __future__ import annotations

import json
import re

__all__ = ["word_problems"]


def word_problems(source: str = "gsm8k") -> list[tuple[str, str]]:
    """Question and worked answer of each problem, in their order.

    The marks that GSM8K has for a calculator (``<<3*4=12>>``) are left out, and its ``#### 12`` reads "The answer is
    12."

    Args:
        source: ``gsm8k``, or ``sums``: 40 sums in words, which are made here.

    Raises:
        UserError: the file of GSM8K cannot be had.
    """
    if source == "sums":
        return [_sum(i) for i in range(40)]
    from . import files

    rows = map(json.loads, files.text("gsm8k-test").splitlines())
    return [(row["question"], _plain(row["answer"])) for row in rows]


def _plain(answer: str) -> str:
    return re.sub(r"\n#### (.*)", r"\nThe answer is \1.", re.sub(r"<<[^>]*>>", "", answer))


def _sum(i: int) -> tuple[str, str]:
    apples, bought, given = 3 + i % 7, 2 + i % 5, 1 + i % 3
    question = (
        f"Tom has {apples} apples. He buys {bought} more and gives {given} of them away. How many apples has he now?"
    )
    had = apples + bought
    answer = (
        f"Tom has {apples} apples and buys {bought} more, so he has {apples} + {bought} = {had} apples.\n"
        f"He gives {given} of them away, so {had} - {given} = {had - given} apples are left.\n"
        f"The answer is {had - given}."
    )
    return question, answer
