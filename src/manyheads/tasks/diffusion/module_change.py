# SPDX-License-Identifier: Apache-2.0
"""How much the outputs of attention modules change from one denoising step to the next, by kind and part of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...experiment import Metric, Row, RunContext, WorkUnit
from ._image_task import ImageTask, pipe_of

__all__ = ["ModuleChange"]

PARTS = ("first", "middle", "last")


@dataclass(frozen=True, kw_only=True)
class ModuleChange(ImageTask):
    """Mean square of a module's change since the step before, over the mean square of its output; the baseline's alone.

    Attributes:
        edge: share of the steps that counts as the first, and as the last, part of a run.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("change", "relative change of attention outputs"),)

    edge: float = 0.15
    batch: int = 2

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        seed, first, last = (unit.params[name] for name in ("seed", "first", "last"))
        recorder: Any = manyheads.parse("pab.redundancy")
        with manyheads.use(pipe_of(run), recorder) as port:
            self.images(run, run.baseline, seed, first, last, acting=())
        edge = round(self.edge * self.steps)
        for curve in recorder.curves(port):
            change = np.array(curve.relative)
            split = np.split(change, [edge, len(change) - edge])
            for part, values in zip(PARTS, split, strict=True):
                yield self.row(
                    "change", run.baseline, values.mean(), f"{first}", seed=seed, context=f"{seed}.{first}",
                    at={"kind": curve.kind, "part": part},
                )  # fmt: skip
        run.advance(unit.cost)
