# SPDX-License-Identifier: Apache-2.0
"""Problems with worked answers: GSM8K's test part, sums of our own, and what an answer comes to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

__all__ = ["last_number", "word_problems", "worked_sum"]


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


def worked_sum(numbers: Sequence[int]) -> tuple[str, str]:
    """Question and worked answer of the sum of two numbers or more, negative ones taken away, one step a line.

    worked_sum([47, 85, -36])  # What is 47 + 85 - 36? ... 47 + 85 = 132. 132 - 36 = 96. The answer is 96.
    """
    total, steps, asked = numbers[0], [], f"{numbers[0]}"
    for number in numbers[1:]:
        term = f" {'-' if number < 0 else '+'} {abs(number)}"
        steps.append(f"{total}{term} = {total + number}.")
        total, asked = total + number, asked + term
    return f"What is {asked}?", " ".join([*steps, f"The answer is {total}."])


def last_number(text: str) -> int | None:
    """The last whole number that a text names, to which its answer comes; None without one."""
    found = re.findall(r"(?<![\w.])-?\d+(?![\w]|\.\d)", text.replace(",", ""))
    return int(found[-1]) if found else None


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
