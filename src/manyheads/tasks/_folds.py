# SPDX-License-Identifier: Apache-2.0
"""Tasks of so few groups that every one of them is tested: a seed is a fold."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..experiment import Row, RunContext, WorkUnit
from ..recipe import Part, Sample
from ._field import FieldTask

__all__ = ["PARTS", "FoldedTask", "by_hash", "part_of", "turned"]

PARTS: tuple[Part, ...] = ("test", "validation", "train")


@dataclass(frozen=True, kw_only=True)
class FoldedTask(FieldTask):
    """A seed is a fold, in which the rate is chosen too; ``samples`` are those of :attr:`fold`.

    Attributes:
        fold: which part is tested; a seed is added to it.
    """

    fold: int = 0

    def units(self, run: RunContext) -> list[WorkUnit]:
        tried = float(len(self.rates) * self.steps)
        return [dataclasses.replace(unit, cost=tried) for unit in super().units(run)]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        """As one run of its own fold, in which the rate is chosen too."""
        alone = run.among(run.arms, run.advance)
        alone.seeds = (unit.params["seed"],)
        for row in FieldTask.measure(dataclasses.replace(self, fold=self.fold + unit.params["seed"]), alone, unit):
            first = unit.params["seed"] == run.seeds[0]  # of whose fold pictures are kept
            about = {name: x for name, x in row.about.items() if first or name != "pictures"}
            yield dataclasses.replace(row, about=about)


def by_hash(name: str) -> bytes:
    """A key to sort by that says nothing."""
    return hashlib.sha256(name.encode()).digest()


def part_of(home: int, fold: int, count: int) -> Part:
    """The part of a group that is dealt to ``home`` of ``count`` folds: ``fold`` is tested, the next one validates."""
    return {0: "test", 1: "validation"}.get((home - fold) % count, "train")  # type: ignore[return-value]


@lru_cache(maxsize=32)
def turned(parts: tuple[tuple[Sample, ...], ...], fold: int) -> dict[Part, tuple[Sample, ...]]:
    """Samples by part where folds have moved on, in an order that says nothing.

    Args:
        parts: those of fold 0; ``about`` has the ``fold`` that a sample's group is dealt to, and how many ``folds``.
        fold: that is tested.
    """
    moved = [
        dataclasses.replace(s, part=part_of(s.about["fold"], fold, s.about["folds"])) if fold else s
        for some in parts for s in some
    ]  # fmt: skip
    moved.sort(key=lambda sample: by_hash(sample.name))
    return {part: tuple(s for s in moved if s.part == part) for part in PARTS}
