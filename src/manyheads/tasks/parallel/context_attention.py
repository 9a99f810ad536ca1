# SPDX-License-Identifier: Apache-2.0
"""Attention over tokens that processes share: errors, bytes, balance, memory and time of each method on each mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...parallel import PATTERNS
from ...parallel._cost import BACKWARD, CLUSTERS, predict
from ...parallel._counts import Counts, Shape, count
from ...parallel._methods import METHODS, method
from ._attention import Asked, Found, measured, shared_layout, shared_mask
from ._launch import processes

__all__ = ["ARMS", "ITEM", "ContextAttention"]

ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
_MEMORY = ("OutOfMemoryError", "out of memory")


@dataclass(frozen=True, kw_only=True)
class ContextAttention(Task):
    """All methods on one mask after the other, in one start of the processes.

    An arm's option ``method`` is one of :data:`manyheads.parallel._methods.METHODS`. One that cannot do a case gives a
    row ``ran`` of 0 that says why (*not supported*, *out of memory*), and no other.

    Attributes:
        ranks, backend: processes, and what joins them: ``gloo`` on a CPU, ``nccl`` on GPUs.
        tokens: of the whole sequence.
        masks: names of patterns; all where empty.
        heads, kv_heads, width, dtype: of one row of queries, keys and values.
        backward: measure the gradients too.
        node: processes that count as one machine; 0 for all.
        draws: of each mask, from the seed on.
        seed: of the first draw.
        rounds: that are timed.
        checked: tokens up to which results are compared with one process in float64.
        cluster: for which times are modelled.
        limit: seconds that one method may take.
    """

    subject: ClassVar[str] = "processes"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ran", "ran", higher=True, what="1 where the method could do the case"),
        Metric("error", "error", what="the largest difference from one process in float64, of output and gradients"),
        Metric("error_ratio", "error, ratio", what="the same over that of one process in the same dtype"),
        Metric("sent", "sent", "bytes", what="bytes that all processes sent, counted at the calls that send"),
        Metric("formula_gap", "sent, formula", "bytes", what="difference of measured bytes and those of the formula"),
        Metric("least", "needed", "bytes", what="what shares heads, and keys that are seen, alone"),
        Metric("between", "between machines", "bytes"),
        Metric("imbalance", "balance", what="work of the busiest process over the mean, 1 at best"),
        Metric("slowest", "slowest", "ms", kind="time", what="time of the slowest process"),
        Metric("mean", "mean", "ms", kind="time", what="time of the mean process"),
        Metric("rate", "TFLOP/s", "TFLOP/s", higher=True, what="of a process, by the mask's true area"),
        Metric("memory", "memory", "bytes", what="the most that a device held beyond its share of the inputs"),
        Metric("modelled", "modelled", "ms", what="modelled time of the slowest process"),
    )

    ranks: int = 4
    backend: str = "gloo"
    tokens: int = 512
    masks: tuple[str, ...] = ()
    heads: int = 8
    kv_heads: int = 2
    width: int = 64
    dtype: str = "float32"
    backward: bool = False
    node: int = 0
    draws: int = 1
    seed: int = 0
    rounds: int = 3
    checked: int = 4096
    cluster: str = "h100"
    limit: float = 300.0

    def __post_init__(self) -> None:
        """Refuse what no process could do."""
        for what, name, known in (
            ("mask", [m for m in self.masks if m not in PATTERNS], PATTERNS),
            ("dtype", [self.dtype] if self.dtype not in ITEM else [], ITEM),
            ("cluster", [self.cluster] if self.cluster not in CLUSTERS else [], CLUSTERS),
            ("backend", [self.backend] if self.backend not in ("gloo", "nccl") else [], ("gloo", "nccl")),
        ):
            if name:
                raise UserError(f"there is no {what} {name[0]!r}; there are {', '.join(known)}")
        if not 1 <= self.ranks <= self.tokens:
            raise UserError(f"{self.tokens} tokens cannot be shared by {self.ranks} processes; use fewer")

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{mask}.{draw}", float(len(run.arms)), mask, {"mask": mask, "draw": draw}, "processes")
            for mask in self.masks or PATTERNS
            for draw in range(self.seed, self.seed + self.draws)
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        mask, draw = unit.params["mask"], unit.params["draw"]
        for arm in run.arms:
            yield from self._rows(run, arm, mask, draw)
            run.advance(1.0)

    def _rows(self, run: RunContext, arm: Arm, mask: str, draw: int) -> Iterator[Row]:
        given = method(arm.options["method"]).given(self.ranks, self.node, self.kv_heads)
        about: dict[str, Any] = {**given, "ranks": self.ranks}
        sample: dict[str, Any] = {"sample": f"{mask}.{draw}", "at": {"mask": mask}}
        how = given.pop("layout")
        try:
            counts = self.counts(mask, draw, how, given)
        except UserError as error:
            yield self.row("ran", arm, 0, about={**about, "why": f"not supported: {error}"}, **sample)
            return
        asked = Asked(
            mask=mask, tokens=self.tokens, draw=draw, layout=how, given=given, heads=self.heads,
            kv_heads=self.kv_heads, width=self.width, dtype=self.dtype, backward=self.backward, node=self.node,
            rounds=self.rounds, checked=self.checked,
        )  # fmt: skip
        try:
            found: list[Found] = processes(run, self.ranks, self.backend, self.limit).run(measured, asked)
        except RuntimeError as error:
            if not any(said in str(error) for said in _MEMORY):
                raise
            yield self.row("ran", arm, 0, about={**about, "why": "out of memory"}, **sample)
            return
        yield self.row("ran", arm, 1, about=about, **sample)
        for name, value in self._counted(counts, found).items():
            yield self.row(name, arm, value, **sample)
        for name, values in _timed(counts, found, self.backward).items():
            for number, value in enumerate(values):
                yield self.row(
                    name, arm, value, **{**sample, "sample": f"{mask}.{draw}.{number}", "context": f"{mask}.{draw}"}
                )

    def counts(self, mask: str, draw: int, how: str, given: dict[str, Any]) -> Counts:
        """What a method does, by formulas."""
        shape = Shape(self.heads, self.kv_heads, self.width, itemsize=ITEM[self.dtype])
        shared = shared_layout(how, mask, self.tokens, draw, self.ranks)
        return count(shared_mask(mask, self.tokens, draw), self.ranks, shared, shape, **given)

    def _counted(self, counts: Counts, found: list[Found]) -> dict[str, float]:
        sent = sum(one.sent for one in found)
        place = CLUSTERS[self.cluster]
        place = dataclasses.replace(place, node=self.node or place.node)
        rows = {
            "sent": sent, "formula_gap": abs(sent - counts.total(self.backward)), "least": counts.least(self.backward),
            "between": sum(one.between for one in found), "imbalance": counts.imbalance,
            "modelled": 1e3 * predict(counts, place).slowest(self.backward),
        }  # fmt: skip
        if errors := found[0].errors:
            rows["error"] = max(error for error, _ in errors.values())
            if ITEM[self.dtype] == 2:
                rows["error_ratio"] = max(error / max(alone, 1e-30) for error, alone in errors.values())
        if all(one.memory is not None for one in found):
            rows["memory"] = max(one.memory or 0 for one in found)
        return rows


def _timed(counts: Counts, found: list[Found], backward: bool) -> dict[str, list[float]]:
    """Milliseconds of the slowest and of the mean process in each round, and the rate of the slowest."""
    rounds = [[sum(one) for one in each] for each in zip(*(one.seconds for one in found), strict=True)]
    flops = counts.flops * (1 + BACKWARD * backward) / counts.ranks
    return {
        "slowest": [1e3 * max(each) for each in rounds], "mean": [1e3 * fmean(each) for each in rounds],
        "rate": [flops / max(each) / 1e12 for each in rounds],
    }  # fmt: skip


ARMS = tuple(Arm(name, options={"method": name}) for name in METHODS)
