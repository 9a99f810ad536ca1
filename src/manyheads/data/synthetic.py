# SPDX-License-Identifier: Apache-2.0
"""Sequences made by a rule, on which a mixer shows what it can remember."""

from functools import cache
from math import comb

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["associative_recall", "guessed_recall"]


def associative_recall(
    batch: int, length: int, pairs: int, vocab: int, generator: torch.Generator, asked: int = 1
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of key and value, then the keys again.

    The first ``2 * pairs`` tokens are keys and their values in turn; then all keys come again in random order, each
    followed by its value, with filler 0 at random places between them. A value can be predicted only by looking it up.

    Args:
        batch: B sequences.
        length: T tokens to predict from; at least ``2 * (1 + asked) * pairs``.
        pairs: key-value pairs; no key stands twice.
        vocab: tokens; 0 is filler, the lower half of the rest are keys, the upper half values.
        generator: of all draws; its device is that of the result.
        asked: times that every key comes again; only the first cannot be answered from an earlier question.

    Returns:
        ``ids [B, T + 1]`` and ``loss_mask`` bool ``[B, T]``, True where the next token is a value asked for.

    Raises:
        UserError: more pairs than keys, or than the length holds.
    """
    keys, least = (vocab - 1) // 2, 2 * (1 + asked) * pairs
    if pairs > keys or least > length + 1:
        raise UserError(f"{pairs} pairs need {2 * pairs + 1} tokens of vocabulary and {least - 1} of length")
    device = generator.device

    def shuffled(count: int, of: int) -> Tensor:
        return torch.rand(batch, of, generator=generator, device=device).argsort(1)[:, :count]

    key = 1 + shuffled(pairs, keys)
    value = 1 + keys + torch.randint(vocab - 1 - keys, (batch, pairs), generator=generator, device=device)
    ids = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
    loss_mask = torch.zeros(batch, length + 1, dtype=torch.bool, device=device)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = key, value
    places = (length + 1 - 2 * pairs) // 2  # of two tokens each
    at = 2 * pairs + 2 * shuffled(asked * pairs, places)
    order = shuffled(asked * pairs, asked * pairs) % pairs
    ids.scatter_(1, at, key.gather(1, order))
    ids.scatter_(1, at + 1, value.gather(1, order))
    loss_mask.scatter_(1, at, True)
    return ids, loss_mask[:, :-1]


@cache
def guessed_recall(pairs: int, values: int) -> float:
    """Expected share of the values of :func:`associative_recall`, asked once, that the best guess without keys gets.

    Such a guess knows which values stand in the sequence and which of them have been said since: it takes the one that
    is left most often. With k pairs left their values are k independent uniform draws, so that it is right with
    probability E[M_k] / k, M_k being how often the most frequent of them was drawn. A draw from all values of the
    sequence, with nothing crossed out, gets ``1 / pairs + (1 - 1 / pairs) / values`` and less.

    Args:
        pairs: in a sequence, each asked for once.
        values: that there are, all equally likely.
    """
    return sum(_most_frequent(left, values) / left for left in range(1, pairs + 1)) / pairs


def _most_frequent(draws: int, values: int) -> float:
    """Expected number of the most frequent of ``values`` in so many uniform draws: the sum of P(M > m) over m."""
    within = sum(_sequences(draws, values, most) for most in range(draws))
    return draws - within / float(values**draws)


def _sequences(draws: int, values: int, most: int) -> int:
    """Sequences of ``draws`` in which none of ``values`` comes more than ``most`` times."""
    ways = [1] + [0] * draws  # by length, value after value
    for _ in range(values):
        ways = [sum(comb(n, m) * ways[n - m] for m in range(min(n, most) + 1)) for n in range(draws + 1)]
    return ways[draws]
