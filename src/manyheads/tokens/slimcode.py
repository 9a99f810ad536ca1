# SPDX-License-Identifier: Apache-2.0
"""SlimCode: words of a program go by what they are, without any model: signs first, the signature last.

"Natural Is The Best: Model-Agnostic Code Simplification for Pre-trained Large Language Models", Wang et al., arXiv
2405.11196; released code gksajy/slimcode (Java). Its order: signs; what is of no category; in control structures what
is no identifier, in calls what is none; identifiers outside of both, in calls, in structures; the signature. Here a
structure is the head of an ``if``, loop, ``try``, ``with`` or ``match`` of Python (theirs are whole statements), and of
equal words the last goes first.
"""

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..text_reducing import TextWeights
from ._programs import CONTROL, Piece, Program, ProgramReducer

__all__ = ["SlimCode"]

_NOT_NAMES = frozenset(map(str.lower, keyword.kwlist))


@dataclass(frozen=True, kw_only=True)
class SlimCode(ProgramReducer):
    """Shortens Python programs by rules."""

    def order(self, program: Program, limit: int, weights: TextWeights | None) -> Sequence[int]:
        level = [_level(piece, program.kinds[piece.statement]) for piece in program.pieces]
        return sorted(range(len(level)), key=lambda i: (level[i], -i))


def _level(piece: Piece, kind: str) -> int:
    """From 0, which goes first, to 7."""
    if kind == "method":
        return 7
    if not re.search(r"\w", piece.word.replace("_", "")):
        return 0
    name = piece.word not in _NOT_NAMES and not piece.word[0].isdigit()
    if kind in CONTROL:
        return 6 if name else 2
    if piece.called:
        return 5 if name else 3
    return 4 if name else 1
