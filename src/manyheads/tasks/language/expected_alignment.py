# SPDX-License-Identifier: Apache-2.0
"""How exact a monotonic alignment is that training expects, by the length of the source: of probabilities at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Metric, Row, RunContext, Task, WorkUnit

__all__ = ["Aligned", "ExpectedAlignment", "recursion"]


@runtime_checkable
class Aligned(Protocol):
    """A strategy that expects an alignment ``[.., T, S]`` of probabilities of writing."""

    def expected(self, p: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ExpectedAlignment(Task):
    """Probabilities of writing, uniform from 0 to 1, of sources as long as those of speech, five positions to a word.

    Arms are those that are :class:`Aligned`. What they say in float32 is compared with the
    definition in float64.

    Attributes:
        lengths: positions of a source, S.
        draws: matrices of probabilities of each length.
        only: names of the arms that are measured; all that have an alignment when empty.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("mass", "mass of the last word's alignment", higher=True, what="1 where none is lost"),
        Metric("error", "largest error of an alignment", what="of all words and positions"),
    )

    lengths: tuple[int, ...] = (10, 50, 200, 500)
    draws: int = 20
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if min(self.draws, *self.lengths) < 1:
            raise UserError("lengths and draws count, 1 or more")

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 1.0, f"{arm.key}: expected alignment", {"arm": arm.key})
            for arm in run.arms
            if arm.spec and isinstance(arm.strategy, Aligned) and (not self.only or arm.name in self.only)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm: Any = run.arm_of(unit)
        for length in self.lengths:
            p = torch.from_numpy(run.rng(length=length).random((self.draws, max(1, length // 5), length)))
            with torch.no_grad():
                found, exact = arm.strategy.expected(p.float().to(run.device)).cpu(), recursion(p.float().double())
            for i in range(self.draws):
                at, name = {"length": length}, f"{length} positions, draw {i}"
                yield self.row("mass", arm, float(found[i, -1].sum()), name, at=at)
                yield self.row("error", arm, float((found[i] - exact[i]).abs().max()), name, at=at)


def recursion(p: Tensor) -> Tensor:
    """The definition, ``[.., T, S]``: word i is written at j if that is not before the last one's, and not before."""
    before, found = torch.zeros_like(p[..., 0, :]), []
    before[..., 0] = 1
    for row in p.unbind(-2):
        waits, now = torch.zeros_like(row[..., 0]), []
        for came, stops in zip(before.unbind(-1), row.unbind(-1), strict=True):
            waits = waits + came
            now.append(waits * stops)
            waits = waits * (1 - stops)
        before = torch.stack(now, -1)
        found.append(before)
    return torch.stack(found, -2)
