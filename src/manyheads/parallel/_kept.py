# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing that computes attention once (Selective Checkpoint++ of LoongTrain, arXiv 2406.18485).

    from torch.utils.checkpoint import checkpoint
    checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention)

What a layer computes is thrown away and computed again before its gradients, except for the output and log-sum-exp of
the attention that processes share: with these two the way back needs no attention forward, and no exchange of keys
beyond its own. Queries, keys and values are computed again. A layer then holds ``H (dv + 1)`` numbers a token more than
without, those that attention itself keeps for the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["Kept", "keep_attention", "kept"]

Found = tuple[Tensor, Tensor]


class Kept:
    """Outputs and log-sum-exps of the attention calls of one checkpointed region, in order.

    Attributes:
        found: of the first time.
        again: calls so far of the second time; None during the first.
    """

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.again: int | None = None

    def add(self, found: Found) -> None:
        """A call has been computed."""
        if self.again is None:
            self.found.append((found[0].detach(), found[1].detach()))

    def next(self) -> Found | None:
        """What the call at hand gave the first time; None where this is the first time."""
        if self.again is None:
            return None
        self.again += 1
        out, lse = self.found[self.again - 1]
        return out.detach(), lse.detach()


_now: ContextVar[Kept | None] = ContextVar("kept", default=None)


def kept() -> Kept | None:
    """Where the attention call at hand is kept, None where it is not."""
    return _now.get()


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`, which asks it once for each region."""
    here = Kept()
    return _within(here, again=False), _within(here, again=True)


@contextmanager
def _within(here: Kept, again: bool) -> Iterator[None]:
    here.again = 0 if again else None
    before = _now.set(here)
    try:
        yield
    finally:
        _now.reset(before)
