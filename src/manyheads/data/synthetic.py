# SPDX-License-Identifier: Apache-2.0
"""Sequences made by a rule, on which a mixer shows what it can remember."""

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["associative_recall", "planted_values"]


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


def planted_values(
    batch: int, length: int, filler: int, kinds: int, values: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A value of each kind anywhere among filler; at the end each kind is asked for once and its value follows.

    Args:
        batch: B sequences.
        length: T tokens to predict from; more than ``3 * kinds``.
        filler: tokens that stand for nothing, the first of the vocabulary; behind them a question for each kind, and
            the values of the first kind, the second, ...
        kinds: values to be found.
        values: that a kind has.
        generator: of all draws; its device is that of the result.

    Returns:
        ``ids [B, T + 1]`` and ``loss_mask`` bool ``[B, T]``, True where the next token is a value asked for.

    Raises:
        UserError: the length does not hold so many kinds.
    """
    if length + 1 < 3 * kinds:
        raise UserError(f"{kinds} values and questions need a length of {3 * kinds - 1}")
    device = generator.device
    ids = torch.randint(filler, (batch, length + 1), generator=generator, device=device)
    drawn = torch.randint(values, (batch, kinds), generator=generator, device=device)
    value = filler + kinds + torch.arange(kinds, device=device) * values + drawn
    places = torch.rand(batch, length + 1 - 2 * kinds, generator=generator, device=device).argsort(1)[:, :kinds]
    ids.scatter_(1, places, value)
    order = torch.rand(batch, kinds, generator=generator, device=device).argsort(1)
    ids[:, -2 * kinds :: 2], ids[:, 1 - 2 * kinds :: 2] = filler + order, value.gather(1, order)
    loss_mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
    loss_mask[:, 1 - 2 * kinds :: 2] = True
    return ids, loss_mask
