# SPDX-License-Identifier: Apache-2.0
"""Planted constants: lines such as ``NAME = 12345`` put between the lines of real code and asserted at its end.

Two things a language model does with its context can be counted exactly with them: recalling one value of one or
several (``assert NAME == 12345``), and following a chain (``ALIAS = NAME``; ``assert ALIAS == NAME == 12345``).
A chain is asserted link by link: asked for the number alone, a model of this size and training finds *a* constant
but not the right one.
All is done in tokens, and gives the tokens that encoding the finished text would give.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer

Ids = np.ndarray[Any, np.dtype[np.int32]]
Take = Callable[[int], Ids]  # a number of tokens -> that many tokens of real code


@dataclass(frozen=True)
class Planter:
    """Makes sequences with planted constants; built once per tokenizer and set of words, cheap to call."""

    names: list[list[int]]  # tokens of each name at the beginning of a line
    spaced: list[list[int]]  # tokens of each name after a space
    digits: list[int]
    newline: list[int]
    equals: list[int]  # " = "
    check: list[int]  # "assert"
    is_equal: list[int]  # " == "
    starts_line: np.ndarray[Any, np.dtype[np.bool_]]  # [V]: the token begins with a newline

    @classmethod
    def build(cls, tokenizer: Tokenizer, words: Sequence[str], seed: int, names: int = 20_000) -> "Planter":
        """Return a planter whose names are one to three of ``words`` in capitals: ``WIDTH``, ``INDEX_RETRY_NAME``."""
        rng, drawn_from = np.random.default_rng(seed), np.array(words)  # once: a draw from a list makes one each time
        pool = list(dict.fromkeys("_".join(rng.choice(drawn_from, rng.integers(1, 4))).upper() for _ in range(names)))

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text).ids)

        vocabulary = tokenizer.get_vocab()
        return cls(
            names=[encode(name) for name in pool],
            spaced=[encode(f" {name}") for name in pool],
            digits=[encode(str(d))[0] for d in range(10)],
            newline=encode("\n"),
            equals=encode("x = ")[1:],
            check=encode("assert"),
            is_equal=encode("x == ")[1:],
            starts_line=np.array([t.startswith("Ċ") for t, _ in sorted(vocabulary.items(), key=lambda item: item[1])]),
        )

    def training(self, take: Take, length: int, rng: Generator) -> Ids:
        """Return ``length`` tokens: code with 1 to 6 constants (at times up to 40), aliases of some, and assertions.

        A constant stands before or after its aliases, and the assertions come in random order, so a value can be had
        only by looking it up. Half of the aliased constants are not asserted for themselves.
        """
        most = 40 if rng.random() < 0.25 and length >= 2048 else 6
        count = int(rng.integers(1, most + 1))
        names = rng.choice(len(self.names), 2 * count, replace=False)
        roots, aliases = names[:count], names[count : count + rng.integers(0, count + 1)]
        targets = rng.integers(0, count, len(aliases))
        values = [self._number(5 if rng.random() < 0.75 else int(rng.integers(3, 9)), rng) for _ in roots]
        lines = [self._constant(n, v) for n, v in zip(roots, values, strict=True)]
        lines += [self._alias(n, roots[t]) for n, t in zip(aliases, targets, strict=True)]
        asked = [self._chain(n, roots[t], values[t]) for n, t in zip(aliases, targets, strict=True)]
        asked += [self._assertion(roots[i], values[i]) for i in range(count) if i not in targets or rng.random() < 0.5]
        asks = [asked[i] for i in rng.permutation(len(asked))]
        return self._compose(take, lines, asks, length, rng)

    def question(self, take: Take, length: int, kind: str, rng: Generator) -> tuple[Ids, int]:
        """Return (``length`` tokens that end in one assertion, the number of last tokens that are its answer).

        ``kind``: "one" constant; one of "several" (6); "chained": one of 3 aliases of 3 constants, each alias after its
        constant; "reversed": the same with every alias before its constant. The answer is the five digits, and for an
        alias the name it stands for before them.
        """
        count = {"one": 1, "several": 6, "chained": 3, "reversed": 3}[kind]
        names = rng.choice(len(self.names), 2 * count, replace=False)
        roots, aliases = names[:count], names[count:]
        values = [self._number(5, rng) for _ in roots]
        constants = [self._constant(n, v) for n, v in zip(roots, values, strict=True)]
        answer = 5
        if kind in ("one", "several"):
            ask = self._assertion(roots[0], values[0])
            lines = [constants[i] for i in rng.permutation(count)]
        else:
            ask = self._chain(aliases[0], roots[0], values[0])
            answer += len(self.spaced[roots[0]]) + len(self.is_equal)
            links = [self._alias(a, r) for a, r in zip(aliases, roots, strict=True)]
            order = rng.permutation(count)
            first, second = (constants, links) if kind == "chained" else (links, constants)
            lines = [first[i] for i in order] + [second[i] for i in rng.permutation(count)]
        return self._compose(take, lines, [ask], length, rng, ordered=True), answer

    def _number(self, size: int, rng: Generator) -> list[int]:
        return [rng.choice(self.digits[1:]), *rng.choice(self.digits, size - 1)]

    def _constant(self, name: int, value: list[int]) -> list[int]:
        return [*self.newline, *self.names[name], *self.equals, *value]

    def _alias(self, name: int, target: int) -> list[int]:
        return [*self.newline, *self.names[name], *self.equals[:-1], *self.spaced[target]]

    def _assertion(self, name: int, value: list[int]) -> list[int]:
        return [*self.newline, *self.check, *self.spaced[name], *self.is_equal, *value]

    def _chain(self, alias: int, name: int, value: list[int]) -> list[int]:
        start = [*self.newline, *self.check, *self.spaced[alias], *self.is_equal[:-1]]
        return [*start, *self.spaced[name], *self.is_equal, *value]

    def _compose(
        self,
        take: Take,
        lines: list[list[int]],
        asks: list[list[int]],
        length: int,
        rng: Generator,
        ordered: bool = False,
    ) -> Ids:
        """Real code with ``lines`` at random ends of lines (in the given order if ``ordered``) and ``asks`` last."""
        body = take(max(0, length - sum(map(len, lines)) - sum(map(len, asks))))
        ends = np.flatnonzero(self.starts_line[body])
        cuts = rng.choice(ends, len(lines)) if len(ends) else np.zeros(len(lines), int)
        parts: list[Any] = []
        last = 0
        order = range(len(lines)) if ordered else rng.permutation(len(lines))
        for cut, i in zip(np.sort(cuts), order, strict=True):
            parts += [body[last:cut], lines[i]]
            last = cut
        return np.concatenate([*parts, body[last:], *asks])[-length:].astype(np.int32)
