# SPDX-License-Identifier: Apache-2.0
"""Digits as words."""

import re

__all__ = ["DIGITS", "spelt"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelt(text: str) -> str:
    """``text`` in lower case, each figure as a word of its own."""
    return re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text.lower())
