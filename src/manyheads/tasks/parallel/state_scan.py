# SPDX-License-Identifier: Apache-2.0
"""What a scan over states sends, how many messages follow each other in it, and that it changes no result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...data.texts import corpus
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...parallel import Processes, _cost
from ...parallel.zeco import ZeCO
from . import _state_runs as runs
from ._published import PUBLISHED, published_fit

__all__ = ["StateScan"]

# (B, H, K, V): more and fewer rows, heads, channels of keys and of values.
_SHAPES = ((1, 4, 16, 16), (2, 2, 8, 32), (1, 8, 32, 8), (3, 2, 16, 24))
_ITEM = 4  # bytes of float32


@dataclass(frozen=True, kw_only=True)
class StateScan(Task):
    """Counts by several numbers of processes, errors, a training, and what the alpha-beta model says of more of them.

    ``volume`` is in states of a head and row times their number, B H K V numbers; ``steps`` is by a logical clock.
    ``residual``: what the model says of each published time, fitted to the others (:mod:`._published`).

    Attributes:
        only: names of the arms that this is about.
        processes: numbers of them.
        length: tokens of a sequence whose errors are looked at.
        seeds_drawn: sequences.
        steps: of the trainings.
        training_processes: that share one.
        mixers: of the models trained.
        predicted: numbers of processes that the model is asked for.
    """

    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("volume", "sent by the busiest process, states", "states"),
        Metric("volume_back", "the same, backward", "states"),
        Metric("steps", "messages that follow each other", "messages"),
        Metric("steps_error", "those less the formula's", "messages"),
        Metric("error", "output and gradients beside one process, relative"),
        Metric("loss_gap", "loss beside that of one process", "nats/byte"),
        Metric("loss", "loss of one process", "nats/byte"),
        Metric("residual", "modelled time beside the published, relative"),
        Metric("modelled", "modelled, ms", "ms"),
    )

    only: tuple[str, ...] = ()
    processes: tuple[int, ...] = (2, 4, 8)
    length: int = 61
    seeds_drawn: int = 4
    steps: int = 40
    training_processes: int = 4
    mixers: tuple[str, ...] = ("tnl_lightning", "minimax_hybrid:every=0")
    predicted: tuple[int, ...] = (8, 32, 128, 256)

    def units(self, run: RunContext) -> list[WorkUnit]:
        counts = [
            WorkUnit(self.key, f"{n} processes", 20.0 * n, f"{n} processes", {"processes": n}) for n in self.processes
        ]
        trained = WorkUnit(self.key, "training", float(self.steps), "training", {"trains": True})
        return [*counts, trained, WorkUnit(self.key, "model", 1.0, "the model", {"models": True})]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arms = [arm for arm in run.arms if arm.name in self.only]
        if unit.params.get("models"):
            yield from self._model(arms)
        elif unit.params.get("trains"):
            yield from self._training(arms)
        else:
            yield from self._counts(arms, unit.params["processes"])

    def _counts(self, arms: list[Arm], count: int) -> Iterator[Row]:
        at = {"processes": count}
        with Processes(count, limit=300) as pool:
            for arm in arms:
                strategy = arm.strategy
                assert isinstance(strategy, ZeCO)
                by_rank = pool.run(runs.counted, arm.full_spec, _SHAPES)
                for i, shape in enumerate(_SHAPES):
                    name, state = "x".join(map(str, shape)), _ITEM * math.prod(shape)
                    forward, back, clock = (max(rank[i][j] for rank in by_rank) for j in range(3))
                    yield self.row("volume", arm, forward / state, name, at=at)
                    yield self.row("volume_back", arm, back / state, name, at=at)
                    yield self.row("steps", arm, clock, name, at=at)
                    gap = abs(clock - self._formula(strategy, count, shape))
                    yield self.row("steps_error", arm, gap, f"{name}, {count}")
                found = pool.run(runs.errors, arm.full_spec, self.length, range(self.seeds_drawn))
                for seed, each in enumerate(zip(*found, strict=True)):
                    yield self.row("error", arm, max(each), f"{count}.{seed}")

    def _formula(self, strategy: ZeCO, count: int, shape: tuple[int, ...]) -> int:
        """Messages that follow each other, by the formula of the exchange."""
        link, size = _cost.CLUSTERS[strategy.cluster].link(count), float(_ITEM * math.prod(shape))
        pieces = min(strategy.pieces or _cost.best_pieces(link, count, size), shape[3])
        return {
            "chain": count - 2 + pieces, "doubling": math.ceil(math.log2(count)), "all_gather": count - 1
        }[strategy.exchange]  # fmt: skip

    def _training(self, arms: list[Arm]) -> Iterator[Row]:
        length, batch = 64, 4
        data = "\n".join(text.content for text in corpus("wikitext")).encode()
        size = self.steps * batch * (length + 1)
        text = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8).view(self.steps, batch, length + 1)
        with Processes(self.training_processes, limit=300) as pool, Processes(1, limit=300) as one:
            for mixer in self.mixers:
                rest = (mixer, text, self.steps, 3e-3)
                (alone,) = one.run(runs.losses, None, *rest)
                for arm in arms:
                    for step, (x, y) in enumerate(
                        zip(pool.run(runs.losses, arm.full_spec, *rest)[0], alone, strict=True)
                    ):
                        yield self.row("loss_gap", arm, abs(x - y), f"{mixer}.{step}", context=mixer)
                        if arm is arms[0] and step in (0, self.steps - 1):
                            yield self.row("loss", arm, y, mixer, at={"step": step})

    def _model(self, arms: list[Arm]) -> Iterator[Row]:
        """The published link and launches; doubling has the launches of an all-gather, the larger ones."""
        for arm in arms:
            strategy = arm.strategy
            assert isinstance(strategy, ZeCO)
            exchange = "step by step" if strategy.pieces == 1 else strategy.exchange
            if exchange in PUBLISHED:
                for count in PUBLISHED[exchange]:
                    if count >= 32:
                        told = published_fit(without=count).time(exchange, count)
                        gap = abs(told / PUBLISHED[exchange][count] - 1)
                        yield self.row("residual", arm, gap, f"{count}", about={"modelled, ms": told})
            whole = published_fit()
            for count in self.predicted:
                for size in (0.25, 0.5, 1.0, 2.0, 4.0):
                    at: dict[str, Any] = {"processes": count}
                    yield self.row("modelled", arm, whole.time(exchange, count, size), f"{size:g} MiB", at=at)
