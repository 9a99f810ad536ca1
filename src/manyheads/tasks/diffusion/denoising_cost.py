# SPDX-License-Identifier: Apache-2.0
"""Seconds of an image, and the share of the attention modules that are run, all arms in turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from ...experiment import Metric, Row, RunContext, WorkUnit
from ._image_task import ImageTask, pipe_of

__all__ = ["KINDS", "DenoisingCost", "computed", "kind_of"]

KINDS = ("spatial", "temporal", "cross")  # of attention modules


@dataclass(frozen=True, kw_only=True)
class DenoisingCost(ImageTask):
    """One round is one batch under every arm in turn, in another order each round; the first call of all is not timed.

    Attributes:
        rounds: repetitions.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("seconds", "seconds an image", "s", kind="time"),
        Metric("attention", "attention computed", kind="mean"),
    )

    rounds: int = 3
    samples: int = 2

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{i}", len(run.arms), f"cost, round {i + 1}", {"round": i}) for i in range(self.rounds)
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...integrations.diffusers import denoisers

        turn, model = unit.params["round"], denoisers(pipe_of(run))[0][1]

        def timed(arm: object) -> tuple[float, int]:
            with computed(model) as counts:
                run.synchronise()
                start = time.perf_counter()
                self.images(run, arm, 0, 0, self.samples)  # type: ignore[arg-type]
                run.synchronise()
                return time.perf_counter() - start, sum(counts.values())

        run.kept("warm-up of images", lambda: timed(run.baseline))
        first = turn % len(run.arms)
        found = {arm.key: (arm, *timed(arm)) for arm in run.arms[first:] + run.arms[:first]}
        whole = found[run.baseline.key][2]
        for arm, seconds, queries in found.values():
            yield self.row("seconds", arm, seconds / self.samples, f"{turn}")
            if whole:
                yield self.row("attention", arm, queries / whole, f"{turn}")
        run.advance(unit.cost)


def kind_of(name: str) -> str:
    """The kind of a Latte's attention module, by its path: within a frame, over frames, or to the text."""
    if name.startswith("temporal_transformer_blocks"):
        return "temporal"
    return "cross" if name.endswith("attn2") else "spatial"


@contextmanager
def computed(model: Any) -> Iterator[Counter[str]]:
    """Count what attention modules are run inside, by kind, in queries: rows times tokens of every call.

    A module is counted at its query projection, which runs with it and with nothing else.
    """
    counts: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if not hasattr(module, "to_q"):
            continue

        def count(_: Any, given: tuple[Any, ...], __: Any, kind: str = kind_of(name)) -> None:
            counts[kind] += given[0].shape[0] * given[0].shape[1]

        handles.append(module.to_q.register_forward_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
