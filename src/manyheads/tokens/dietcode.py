# SPDX-License-Identifier: Apache-2.0
"""DietCode: a program is cut to the statements and words that pre-trained models attend to, before one reads it.

"Diet Code Is Healthy: Simplifying Programs for Pre-trained Models of Code", Zhang et al., FSE 2022, arXiv 2206.14390;
released code zhangzwwww/DietCode. Once, over a corpus: the attention that a word receives is averaged by word, and that
of the words of a statement by the statement's category (a signature, a return, a loop, ...). To bring a program of
statements ``s`` to T tokens, with ``a`` the weight of a category or word and ``n`` a number of tokens:

    1.  keep the statements of the greatest sum of a(category of s) with sum of n(s) <= T + max n (0-1 knapsack)
    2.  of what is kept, drop words from the least a(word) on, until T tokens are left.

The value of a statement is the mean of its category, whatever its length: short statements win. Attention is that of
the last layer, mean over heads and queries (the released code mixes layers, and 0.3 of a word's own weight, for
statements).

Where this differs. Weights are measured on any model of transformers (:func:`manyheads.shortening.learn`), not shipped
as a table; they are relative, 1 being the mean of a program's tokens, so that long programs count as short ones, and
for a causal model each token is compared with what evenly spread attention would give its place. Statements are those
of ``ast``, not of a list of keywords; lengths are tokens of the tokenizer at hand, not words, and the result has at
most T of them as that tokenizer reads it. Unseen words weigh 1; the released code never drops what its list of 5,000
words does not have. ``statements`` and ``value`` take the method apart. The paper's filter by the frequency of words is
not here.

    weights = manyheads.shortening.learn("dietcode", model, tokenizer, corpus)
    manyheads.parse("dietcode:budget=0.6").shorten(program, tokenizer, weights).text
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import UserError
from ..text_reducing import TextWeights
from ._programs import Program, ProgramReducer

__all__ = ["DietCode", "knapsack"]


def knapsack(values: Sequence[float], sizes: Sequence[int], capacity: int) -> list[int]:
    """Which items have the greatest sum of ``values`` with ``sizes`` within ``capacity``; of equal ones the first."""
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(values), capacity + 1), bool)
    for i in range(len(values) - 1, -1, -1):
        size = sizes[i]
        if size <= capacity:
            with_it = best[: capacity + 1 - size] + values[i]
            taken[i, size:] = with_it >= best[size:]
            best[size:] = np.maximum(best[size:], with_it)
    chosen, left = [], capacity
    for i, row in enumerate(taken):
        if row[left]:
            chosen.append(i)
            left -= sizes[i]
    return chosen


@dataclass(frozen=True, kw_only=True)
class DietCode(ProgramReducer):
    """Shortens Python programs by attention.

    Attributes:
        choose: by ``attention``; ``random`` statements and words, and the ``first`` tokens (truncation) are controls.
        statements: choose statements first; else only words go.
        value: of a statement: the mean of its ``category``, or the sum of what the ``tokens`` of its words weigh.
        seed: of ``choose=random``.
    """

    learns: ClassVar[bool] = True

    choose: Literal["attention", "random", "first"] = field(
        default="attention", metadata={"help": "controls beside it"}
    )
    statements: bool = field(default=True, metadata={"help": "choose whole statements before words"})
    value: Literal["category", "tokens"] = field(default="category", metadata={"help": "what a statement is worth"})
    seed: int = field(default=0, metadata={"help": "of choose=random"})

    def learn(self, read: Sequence[Program], received: Sequence[Sequence[float]]) -> TextWeights:
        """Weights from programs and the attention that their tokens received; what a model did not read is left out."""
        words: dict[str, list[float]] = defaultdict(list)
        statements: dict[str, list[float]] = defaultdict(list)
        for program, values in zip(read, received, strict=True):
            given = np.asarray(values, float)
            given, at = given / np.nanmean(given) if len(given) else given, 0
            within: list[list[float]] = [[] for _ in program.kinds]
            for piece in program.pieces:
                mine, at = given[at : at + piece.size], at + piece.size
                mine = mine[np.isfinite(mine)]
                if len(mine):
                    words[piece.word].append(float(mine.mean()))
                    within[piece.statement] += mine.tolist()
            for kind, all_of_it in zip(program.kinds, within, strict=True):
                if all_of_it:
                    statements[kind].append(float(np.mean(all_of_it)))
        return TextWeights(*({k: float(np.mean(v)) for k, v in sorted(d.items())} for d in (statements, words)))

    def worth(self, program: Program, weights: TextWeights | None) -> tuple[float, ...] | None:
        if self.choose != "attention" or weights is None:
            return None
        return tuple(weights.words.get(piece.word, 1.0) for piece in program.pieces)

    def order(self, program: Program, limit: int, weights: TextWeights | None) -> Sequence[int]:
        pieces, sizes = program.pieces, program.sizes()
        if self.choose == "first":
            return range(len(pieces) - 1, -1, -1)
        of_words: Sequence[float]
        if self.choose == "random":
            draw = random.Random(f"{self.seed} {program.text}")
            of_words = [draw.random() for _ in pieces]
            values = [draw.random() for _ in program.kinds]
        else:
            found = self.worth(program, weights)
            if weights is None or found is None:
                raise UserError(f"{self.slug} weighs by attention: give weights of learn, or choose=random or first")
            of_words = found
            values = [weights.statements.get(kind, 1.0) for kind in program.kinds]
            if self.value == "tokens":
                values = _sums(program, of_words)
        chosen: Iterable[int] = range(len(sizes))
        if self.statements:
            chosen = knapsack(values, sizes, min(sum(sizes), limit + max(sizes)))
        kept = set(chosen)
        return sorted(range(len(pieces)), key=lambda i: (pieces[i].statement in kept, of_words[i], -i))


def _sums(program: Program, of_words: Sequence[float]) -> list[float]:
    made: list[Any] = [0.0] * len(program.kinds)
    for piece, weight in zip(program.pieces, of_words, strict=True):
        made[piece.statement] += weight * piece.size
    return made
