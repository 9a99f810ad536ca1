# SPDX-License-Identifier: Apache-2.0
"""Tasks of so few groups that every one of them is tested: a seed is a fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..experiment import Row, RunContext, WorkUnit
from ._field import FieldTask

__all__ = ["FoldedTask"]


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
