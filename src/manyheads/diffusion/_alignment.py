# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a target prompt stand for which of its source: by words that take each other's place, or in common.

A map of a prompt's S columns is carried over by a matrix M ``[S, S]`` (source, target) and a share ``own [S]``: column
j of the target's map becomes ``sum_i A_source[i] M[i, j] + own[j] A_target[j]``.

- :func:`replacement` (as many words in both): word for word; where two words have unlike numbers of tokens each token
  of the source's is spread over all of the target's, so that rows of a map keep their sum. Padding is one such word.
- :func:`refinement`: the longest sequence of tokens in common takes the source's columns, the rest keeps its own.

Prompt-to-Prompt Image Editing with Cross Attention Control (arXiv 2208.01626). Its alignment (Needleman-Wunsch with
gaps at 0, matches at 1 and mismatches at -1) never takes a mismatch: it is the longest common subsequence.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..call import Prompt
from ..errors import UserError

__all__ = ["changed", "common", "factors", "refinement", "replacement", "same_number"]

Texts = Sequence[Prompt]  # a prompt by every tokenizer


def common(a: Sequence[object], b: Sequence[object]) -> list[tuple[int, int]]:
    """Places of a longest common subsequence of ``a`` and ``b``, the earliest that will do."""
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            length[i][j] = length[i + 1][j + 1] + 1 if a[i] == b[j] else max(length[i + 1][j], length[i][j + 1])
    i, j, found = 0, 0, []
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def same_number(source: Texts, target: Texts) -> bool:
    """Whether both prompts have as many words and as many special tokens."""
    return all(len(_groups(a)) == len(_groups(b)) for a, b in zip(source, target, strict=True))


def replacement(source: Texts, target: Texts, size: int) -> tuple[Tensor, Tensor]:
    """M ``[size, size]`` and ``own [size]``, float64, where words take each other's places one by one.

    Raises:
        UserError: one prompt has more words than the other.
    """
    matrix = torch.zeros(size, size, dtype=torch.float64)
    if not same_number(source, target):
        raise UserError(
            f"video_p2p: {_text(source)!r} and {_text(target)!r} have unlike numbers of words; edit=refine is for those"
        )
    for a, b in zip(source, target, strict=True):
        first, stop = _room(a, size)
        pairs = list(zip(_groups(a), _groups(b), strict=True))
        pairs.append((list(range(first + len(a.tokens), stop)), list(range(first + len(b.tokens), stop))))
        for there, here in pairs:
            if len(there) == len(here):
                matrix[there, here] = 1.0
            elif here:
                matrix[torch.tensor(there, dtype=torch.long)[:, None], torch.tensor(here)] = 1 / len(here)
    return matrix, torch.zeros(size, dtype=torch.float64)


def refinement(source: Texts, target: Texts, size: int) -> tuple[Tensor, Tensor]:
    """M ``[size, size]`` and ``own [size]``, float64, where tokens in common take the source's columns."""
    matrix, own = torch.zeros(size, size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for a, b in zip(source, target, strict=True):
        first, stop = _room(a, size)
        found = [(first + i, first + j) for i, j in common(a.tokens, b.tokens)]
        found += [(j, j) for j in range(first + len(b.tokens), stop)]  # padding
        for i, j in found:
            matrix[i, j], own[j] = 1.0, 0.0
    return matrix, own


def changed(source: Texts, target: Texts, words: Sequence[str] = ()) -> tuple[list[int], list[int]]:
    """Places of the tokens of words, in the source and in the target: of those named, or that the other has not.

    Raises:
        UserError: neither prompt has a word that is named.
    """
    if words:
        found = tuple([i for word in words for i in _places(prompt, word)] for prompt in (source, target))
        for word in words:
            if not any(_places(prompt, word) for prompt in (source, target)):
                raise UserError(f"video_p2p: {word!r} is neither in {_text(source)!r} nor in {_text(target)!r}")
        return found[0], found[1]
    there: list[int] = []
    here: list[int] = []
    for a, b in zip(source, target, strict=True):
        kept = common([w.lower() for w in a.words], [w.lower() for w in b.words])
        for prompt, places, same in ((a, there, {i for i, _ in kept}), (b, here, {j for _, j in kept})):
            places += [prompt.start + t for t, w in enumerate(prompt.word_of) if w >= 0 and w not in same]
    return there, here


def factors(target: Texts, weights: Sequence[tuple[str, float]], size: int) -> Tensor:
    """By what each column of the target's map is multiplied, ``[size]`` float64.

    Raises:
        UserError: the target has no such word.
    """
    found = torch.ones(size, dtype=torch.float64)
    for word, factor in weights:
        if not (places := _places(target, word)):
            raise UserError(f"video_p2p: {word!r} is not in the target's prompt {_text(target)!r}")
        found[places] = factor
    return found


def _places(texts: Texts, word: str) -> list[int]:
    """Of the tokens of one word, or of several that follow each other."""
    found, wanted = [], word.lower()
    for prompt in texts:
        known = [_bare(w) for w in prompt.words]
        spans = {
            i + k
            for i in range(len(known))
            for n in range(1, len(known) - i + 1)
            if " ".join(known[i : i + n]) == wanted
            for k in range(n)
        }
        found += [prompt.start + t for t, w in enumerate(prompt.word_of) if w in spans]
    return found


def _bare(word: str) -> str:
    return word.lower().strip(".,;:!?\"'()")


def _groups(prompt: Prompt) -> list[list[int]]:
    """Places of the tokens of each word, and of each special token alone."""
    numbered = enumerate(prompt.word_of)
    grouped = groupby(numbered, lambda pair: (pair[1], pair[0] if pair[1] < 0 else -1))
    return [[prompt.start + t for t, _ in group] for _, group in grouped]


def _room(prompt: Prompt, size: int) -> tuple[int, int]:
    stop = size if prompt.room is None else prompt.start + prompt.room
    if stop > size or prompt.start + len(prompt.tokens) > stop:
        raise UserError(
            f"video_p2p: a prompt of {len(prompt.tokens)} tokens is no part of the {size} that the denoiser reads"
        )
    return prompt.start, stop


def _text(texts: Texts) -> str:
    return " ".join(word for word in texts[0].words if word)
