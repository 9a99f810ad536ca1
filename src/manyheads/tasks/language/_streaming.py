# SPDX-License-Identifier: Apache-2.0
"""Reading and writing in turn: a source is read piece by piece, and words are written before all of it is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._translator import BEGIN, END, PAD, ROOM

__all__ = ["Reading", "Streamed", "prefix", "stream", "word_numbers"]

Reading = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Streamed:
    """What was written.

    Attributes:
        words: pieces, ``[B, T]``; what follows an end says nothing.
        seen: how many pieces of the source had been read when each was written, ``[B, T]``.
        log_probs: of them, ``[B, T]``.
    """

    words: Tensor
    seen: Tensor
    log_probs: Tensor


def prefix(mask: Tensor, read: Tensor) -> Tensor:
    """Who sees what: ``[B, T, S]``, of a source ``mask [B, S]`` the first ``read [B or 1, T or 1]``."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return mask[:, None] & (place < read[..., None])


def stream(model: Any, batch: Any, reading: Reading, right: Tensor | None = None) -> Streamed:
    """Translate with a policy, greedily; an end is written once all has been read, whatever the policy says.

    A source's states are those of its part that has been read, since its encoder reads from first to last. Each piece
    attends to what had been read when it was written, also later.

    Args:
        model: a :class:`Translator` of one source whose encoder is causal.
        batch: of the task.
        reading: given what had been read before each piece, ``[B, T]`` with the next one last, and the lengths of
            sources ``[B]``, says how much is to be read before the next is written, ``[B]``. Where that is more than
            now, it is read, and asked again.
        right: write these, ``[B, T]``, -100 after their end; None for the likeliest.
    """
    states, (mask,) = model.read(batch)
    length, count = mask.sum(1), len(mask)
    words, seen = mask.new_full((count, 1), BEGIN, dtype=torch.long), mask.new_ones((count, 1), dtype=torch.long)
    done, found = mask.new_zeros(count), []
    for t in range(ROOM - 1 if right is None else right.shape[1]):
        if right is not None:
            done = right[:, t] < 0
        settled = done  # who has read enough for this piece is not asked again while others of the batch read
        while True:
            log_probs = model.write(states, [prefix(mask, seen)], words)[:, -1]
            piece = log_probs.argmax(-1) if right is None else right[:, t].clamp(min=PAD)
            now = seen[:, -1]
            wanted = torch.maximum(reading(seen, length), now + (piece == END).long()).minimum(length)
            settled = settled | (wanted <= now)
            if settled.all():
                break
            wanted = torch.where(settled, now, wanted)
            seen = torch.cat((seen[:, :-1], wanted[:, None]), 1)
        found.append(log_probs.gather(1, piece[:, None]))
        words, seen = torch.cat((words, piece[:, None]), 1), torch.cat((seen, seen[:, -1:]), 1)
        done = done | (piece == END)
        if right is None and done.all():
            break
    return Streamed(words[:, 1:], seen[:, :-1], torch.cat(found, 1))


def word_numbers(pieces: Sequence[str]) -> list[int]:
    """Number of the word, from 1 on, that each piece is of: a word begins with a space, which byte BPE writes as G."""
    found, number = [], 0
    for piece in pieces:
        number += piece.startswith("\u0120") or not number
        found.append(number)
    return found
