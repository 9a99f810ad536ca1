# SPDX-License-Identifier: Apache-2.0
"""Seconds of a prompt and milliseconds of a token after it, all arms in turn: whatever else runs slows them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from ...experiment.arms import Arm
from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext
from ._prefill import Prefix, forward_chunked
from ._text_task import TextTask, model_of, tensor

__all__ = ["Speed"]

_WARM, _TIMED = 2, 8  # tokens decoded before and under the clock


@dataclass(frozen=True, kw_only=True)
class Speed(TextTask):
    """One round is a dense prefill, and from it every arm in turn, in another order each round.

    ``prefill`` is the dense forward, shared by all arms of a round that compress after it, and the arm's own work.

    Attributes:
        rounds: repetitions.
        apart: every arm reads the prompt by itself, and keeps of it what it alone needs.
        timed: keys of the arms that are timed; all of them when empty.
        gpu_only: not on a CPU, for what is claimed of kernels.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("prefill", "prompt, s", "s", kind="time", what="time to read the text and to choose what stays"),
        Metric("decode", "token, ms", "ms", kind="time", what="time for each token that is written afterwards"),
    )

    rounds: int = 2
    apart: bool = False
    timed: tuple[str, ...] = ()
    gpu_only: bool = False

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.gpu_only and run.device.type != "cuda":
            return f"what is claimed is the time of kernels of a GPU, and this ran on {run.device.type}"
        return super().unsupported_reason(run)

    def units(self, run: RunContext) -> list[WorkUnit]:
        length = self.lengths[-1]
        arms = self._arms(run)
        cost = (len(arms) if self.apart else 1) * length + 100 * len(arms)
        return [
            WorkUnit(self.key, f"{i}", cost, f"speed, {length} tokens", {"length": length, "round": i})
            for i in range(self.rounds)
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, turn, steps = unit.params["length"], unit.params["round"], _WARM + _TIMED
        context, text, _ = self.contexts(run).plain("speed", length, 1, steps)[0]
        ids, following = tensor(run, [context[:length]]), tensor(run, [context[length:]])
        model, arms = model_of(run), self._arms(run)
        Prefix(model, ids[:, :64], arms)  # warm-up
        dense, prefix = (0.0, None) if self.apart else _timed(run, lambda: Prefix(model, ids, arms))
        first = turn * 5 % len(arms)
        about = {"text": text}
        for arm in arms[first:] + arms[:first]:
            start = _now(run)
            own = Prefix(model, ids, [arm]) if prefix is None else prefix
            with own.open(arm) as cache:
                opened = _now(run) - start
                seconds = [
                    _timed(run, partial(forward_chunked, model, cache, token, 1))[0] for token in following.split(1, 1)
                ]
            whole = opened + (dense if own.serves(arm) else 0.0)
            yield self.row("prefill", arm, whole, f"{turn}", at={"length": length}, about=about)
            for i, value in enumerate(seconds[_WARM:]):
                yield self.row(
                    "decode", arm, 1000 * value, f"{turn}.{i}", context=f"{turn}", at={"length": length}, about=about
                )
            run.advance(unit.cost / len(arms))

    def _arms(self, run: RunContext) -> tuple[Arm, ...]:
        return tuple(arm for arm in run.arms if not self.timed or arm.key in self.timed)


def _now(run: RunContext) -> float:
    run.synchronise()
    return time.perf_counter()


def _timed(run: RunContext, work: Callable[[], Any]) -> tuple[float, Any]:
    start = _now(run)
    result = work()
    return _now(run) - start, result
