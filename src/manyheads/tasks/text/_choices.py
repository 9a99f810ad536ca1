# SPDX-License-Identifier: Apache-2.0
"""Multiple choice by likelihood: which of several replies a model that need not write one holds for likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...experiment.rows import Value
from ...lens import device_of
from ._prefill import forward_chunked, token_nll

__all__ = ["Choice", "continued"]


@dataclass(frozen=True)
class Choice:
    """Which of several replies the model holds for likeliest: 1 if it is the right one, 0 if another is.

    Attributes:
        metric: of the row; without one no row is made, and the likelihoods are what later choices of the same ``prior``
            are compared with.
        candidates: the replies; of equals each gets its part.
        right: index of the one that counts.
        opening: what all of them begin with.
        prior: name of a choice with the same candidates that the baseline has made in a context without what is asked
            for: what counts is by how much the context makes a reply likelier (mutual information, arXiv 2104.08315).
            Without one it is the log-likelihood of a byte of the candidate, as lm-eval's ``acc_norm``.
    """

    metric: str
    candidates: tuple[str, ...]
    right: int = 0
    opening: str = ""
    prior: str = ""
    at: Mapping[str, Value] = field(default_factory=dict)

    def value(self, nats: Sequence[float], before: Sequence[float] | None = None) -> tuple[float, float]:
        """The value, and by how much the right one leads (negative: trails).

        Args:
            nats: log-likelihood of each candidate.
            before: the same under the prior.
        """
        if before is None:
            scores = [x / len(text.encode()) for x, text in zip(nats, self.candidates, strict=True)]
        else:
            scores = [x - y for x, y in zip(nats, before, strict=True)]
        others = [score for i, score in enumerate(scores) if i != self.right]
        best = max(scores)
        return (scores[self.right] == best) / scores.count(best), scores[self.right] - max(others)


def continued(
    model: Any, cache: Any, choices: Sequence[Sequence[Sequence[int]]], piece: int | None = None
) -> list[list[float]]:  # fmt: skip
    """Log-likelihood, in nats, of each of several continuations of what ``cache`` (of one row) holds; it is used up.

    What all begin with is read once, the rest in one batch.

    Args:
        model: whose port is open.
        cache: of one row.
        choices: groups of lists of token ids; tokens that a whole group begins with are not counted.
        piece: most tokens read at once.
    """
    rows = [list(row) for group in choices for row in group]
    shared = _shared(rows)
    rest = [row[shared:] for row in rows]
    width, device = max(map(len, rest)), device_of(model)
    logits = forward_chunked(model, cache, torch.tensor([rows[0][:shared]], device=device), 1, piece)
    logits = logits.expand(len(rows), -1, -1)
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rest], device=device)  # nothing follows it
    if width > 1:
        cache.batch_repeat_interleave(len(rows))
        logits = torch.cat([logits, forward_chunked(model, cache, padded[:, :-1], width - 1, piece)], 1)
    nats = -token_nll(logits, padded)
    found, first = list[list[float]](), 0
    for group in choices:
        begin = _shared(group) - shared
        found.append([float(nats[first + i, begin : len(rest[first + i])].sum()) for i in range(len(group))])
        first += len(group)
    return found


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with, but for the last of each."""
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)
