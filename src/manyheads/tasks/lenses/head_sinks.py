# SPDX-License-Identifier: Apache-2.0
"""Sinks of a language model's heads on text, the values that they rest on, and what the loss of such a head costs.

What a head is worth is measured on the same texts, by the loss that taking it out adds; heads are sampled where a model
has more than ``heads``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ...experiment import Metric, Row, RunContext, WorkUnit
from .._statistics import rank_correlation
from ..text._text_task import model_of
from ._windows import WindowTask, nll

__all__ = ["HeadSinks"]

DORMANT = 0.5  # attention on the first token above which a head is called dormant
GREATEST = 0.1  # share of the heads that are looked at as the greatest sinks


@dataclass(frozen=True, kw_only=True)
class HeadSinks(WindowTask):
    """A value for each text; the baseline's alone.

    Attributes:
        heads: how many are taken out, drawn from all.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("head_sink", "attention on the first token, mean of heads"),
        Metric("dormant", f"heads whose attention on the first token is above {DORMANT}", kind="share"),
        Metric("head_drain", "norm of the first value over the others', median head"),
        Metric("residual_peak", "norm of the first token's residual stream over the others', worst block"),
        Metric("sink_and_worth", "rank correlation over heads of sink with loss added without the head"),
    )

    heads: int = 24

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "heads", float(self.heads + 1), f"taking out {self.heads} heads")]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        model, ids = model_of(run), self.windows(run)
        with manyheads.watch(model, "active_dormant") as seen:
            plain = nll(model, ids)
        tables = seen.compute().tables
        sink, drain, peak = (tables[name].values for name in ("sink", "drain", "peak"))
        drawn = self._drawn(run, sink.shape[1:])
        run.advance(unit.cost * (1 - len(drawn) / (self.heads + 1)))  # the plain pass, and heads that the model lacks
        cost = np.stack([self._cost(run, unit, tables["sink"].layers[row], head, plain) for row, head in drawn], 1)
        for i in range(len(ids)):
            greatest = sink[i] >= np.quantile(sink[i], 1 - GREATEST)
            for name, at, value in (
                ("head_sink", {}, sink[i].mean()), ("dormant", {}, (sink[i] > DORMANT).mean()),
                ("head_drain", {"heads": "greatest sinks"}, np.median(drain[i][greatest])),
                ("head_drain", {"heads": "others"}, np.median(drain[i][~greatest])),
                ("residual_peak", {}, np.nanmax(peak[i])),
                ("sink_and_worth", {}, rank_correlation([sink[i][at] for at in drawn], cost[i])),
            ):  # fmt: skip
                yield self.row(name, run.baseline, value, f"{i}", at=at)

    def _drawn(self, run: RunContext, shape: Sequence[int]) -> list[tuple[int, int]]:
        every = [(row, head) for row in range(shape[0]) for head in range(shape[1])]
        order = run.rng(heads="head_sinks").permutation(len(every))[: self.heads]
        return [every[i] for i in sorted(order)]

    def _cost(self, run: RunContext, unit: WorkUnit, layer: int, head: int, plain: torch.Tensor) -> Any:
        """Loss that each text gains without a head, ``[N]``."""
        import manyheads

        model = model_of(run)
        with manyheads.use(model, f"ablate:heads={layer}.{head}"):
            without = nll(model, self.windows(run))
        run.advance(unit.cost / (self.heads + 1))
        return (without - plain).mean(1).numpy()
