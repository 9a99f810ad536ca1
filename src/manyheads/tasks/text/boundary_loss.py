# SPDX-License-Identifier: Apache-2.0
"""Whether the first tokens behind a compressed context are harder than later ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...experiment import Metric, RunContext
from ._fed import FedTask, Judged
from ._prefill import token_nll

__all__ = ["BoundaryLoss"]


@dataclass(frozen=True, kw_only=True)
class BoundaryLoss(FedTask):
    """Loss of the first and of the last ``near`` of ``fed`` tokens that go on behind a context.

    Where a context ends with a segment, or was compressed, the first see little but what is left of it; the last see
    the tokens before them, too (condition ``part``: ``after``, ``later``). What is lost against the full cache at the
    one and not at the other is the cost of the boundary.

    Attributes:
        fed: tokens behind the context, the first of which is not judged.
        near: tokens of a part.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "token_nll", "loss by place behind a boundary", "nats/token", what="right after what is packed, or later"
        ),
    )

    fed: int = 64
    near: int = 12

    def drawn(self, run: RunContext, length: int) -> dict[str, list[tuple[Any, Any]]]:
        found = self.contexts(run).plain("boundary", length, self.samples, self.fed)
        return {"plain": [(ids[:length], ids[length:]) for ids, _, _ in found]}

    def judged(self, variant: str, logits: Tensor, fed: Tensor) -> Iterator[Judged]:
        nats = token_nll(logits, fed[:, 1:])
        yield "token_nll", {"part": "after"}, nats[:, : self.near].mean(1).tolist()
        yield "token_nll", {"part": "later"}, nats[:, -self.near :].mean(1).tolist()
