# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens cut out of texts, one from each text before a second from any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from ...data.texts import Text
from ...errors import UserError

__all__ = ["Corpus", "Window", "encode"]

Ids = np.ndarray[Any, np.dtype[np.int64]]
_BACK = 200  # tokens that a window may begin earlier, so that it begins with a line, a sentence or a word
_MOST = 400_000  # characters of one text that are read: enough for many windows, and quick to tokenise


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text; ``text`` names it, ``overlaps`` says that another window shares some of them."""

    ids: Ids
    text: str
    overlaps: bool = False


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of ``text`` as they stand in the middle of a document: no special tokens, no added leading space."""
    head: list[int] = tokenizer.encode("x", add_special_tokens=False)
    whole: list[int] = tokenizer.encode("x" + text, add_special_tokens=False)
    if whole[: len(head)] == head:
        return whole[len(head) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


class Corpus:
    """Texts, tokenised when they are first drawn from."""

    def __init__(self, texts: Sequence[Text], tokenizer: Any) -> None:
        self.texts = texts
        self._tokenizer = tokenizer
        self._ids: dict[int, Ids] = {}

    def windows(self, size: int, count: int, rng: Generator) -> list[Window]:
        """``count`` windows of ``size`` tokens that share none as long as there is text enough.

        Texts of at least ``size`` tokens are drawn in random order, one window of each before the second of any. Only
        when they do not suffice, the shorter ones serve too, joined in their order; then windows overlap and say so.

        Raises:
            UserError: all texts together hold fewer than ``size`` tokens.
        """
        order = [int(i) for i in rng.permutation(len(self.texts))]
        long = [i for i in order if len(self.texts[i].content) >= size]  # a token holds a character or more
        spans: list[tuple[Ids, str]] = []
        for i in long:
            if len(spans) == count:
                break
            if len(ids := self._tokens(i)) >= size:
                spans.append((ids, self.texts[i].name))
        if len(spans) < count:
            short: list[Ids] = []
            for i in sorted(order):
                if sum(map(len, short)) < size * count and len(self._tokens(i)) < size:
                    short.append(self._tokens(i))
            if (total := sum(map(len, short))) >= size:
                spans.append((np.concatenate(short), "short texts, joined"))
            if not spans:
                raise UserError(
                    f"the text is too short: it has {total} tokens, and the longest context needs {size}; "
                    "give more text or shorter --lengths"
                )
        return self._cut(spans, size, count, rng)

    def _cut(self, spans: list[tuple[Ids, str]], size: int, count: int, rng: Generator) -> list[Window]:
        """One window of each span at a random place of its i-th part, for i = 0, 1, ...; then anywhere."""
        parts = [len(ids) // size for ids, _ in spans]
        places = [(i, j) for j in range(max(parts)) for i in range(len(spans)) if j < parts[i]][:count]
        used = [sum(1 for i, _ in places if i == number) for number in range(len(spans))]
        windows = []
        for i, j in places:
            ids, name = spans[i]
            room = len(ids) // used[i] - size
            first = j * (len(ids) // used[i])
            start = self._begin(ids, first + int(rng.integers(0, room + 1)), first)
            windows.append(Window(ids[start : start + size], name))
        while len(windows) < count:
            ids, name = spans[int(rng.integers(len(spans)))]
            start = self._begin(ids, int(rng.integers(0, len(ids) - size + 1)), 0)
            windows.append(Window(ids[start : start + size], name, overlaps=True))
        return windows

    def _begin(self, ids: Ids, start: int, first: int) -> int:
        """The nearest begin of a line at or before ``start``, else of a sentence or a word; at least ``first``."""
        least = max(first, start - _BACK)
        if start == 0 or least == start:
            return start
        text = [self._tokenizer.decode(ids[max(i - 1, 0) : i + 1].tolist()) for i in range(least, start + 1)]
        own = [self._tokenizer.decode([int(i)]) for i in ids[least : start + 1]]
        before = [whole[: len(whole) - len(alone.lstrip())] for whole, alone in zip(text, own, strict=True)]
        for fits in (_line_begins, _sentence_begins, _word_begins):
            if found := [least + i for i, gap in enumerate(before) if fits(gap)]:
                return found[-1]
        return start

    def _tokens(self, i: int) -> Ids:
        if i not in self._ids:
            text = self.texts[i].content[:_MOST]
            # A text may be longer than the model reads: no warning, a window is cut out of it.
            ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
            self._ids[i] = np.array(ids, np.int64)
        return self._ids[i]


def _line_begins(gap: str) -> bool:
    """Whether a line begins behind ``gap``: the text of one token, and the space before the next word."""
    return gap.endswith("\n")


def _sentence_begins(gap: str) -> bool:
    return gap.rstrip().endswith((".", "!", "?")) and _word_begins(gap)


def _word_begins(gap: str) -> bool:
    return gap[-1:].isspace()
