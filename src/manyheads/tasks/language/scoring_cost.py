# SPDX-License-Identifier: Apache-2.0
"""What it costs to score a context's candidates: operations counted, and seconds on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...recipe import Batch, Sample
from ...training.fit import autocast
from .._field_training import FieldTraining, recipe_of, to_device
from ._selection import CrossEncoder, DualEncoder
from .response_selection import ResponseSelection

__all__ = ["ScoringCost"]

_PAIRS = 256  # that a cross-encoder reads at once where seconds are measured


@dataclass(frozen=True, kw_only=True)
class ScoringCost(Task):
    """Contexts of the test part of ``response_selection``, by how many replies are scored for each.

    The vectors of replies are kept, as they can be where context and reply are read apart; a cross-encoder reads every
    pair. Weights are random, of the shape of MiniLM unless the fields say another; ``reading`` is what a reply costs
    once. Operations of a pair are those of the context and its own reply, and of so many pairs as many times that.

    Attributes:
        dim, layers, heads: of every model.
        context_tokens, reply_tokens: that are read at most.
        candidates: replies that are scored.
        contexts: whose operations are counted, and the mean of whose seconds is taken.
        timed: seconds on a GPU; operations else.
        repeats: of a measurement of seconds.
        only: names of the arms that are measured; all that build a model when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("operations", "operations of scoring", "GFLOP/context"),
        Metric("reading", "operations of a reply's vector, once", "GFLOP/reply"),
        Metric("seconds", "seconds of scoring", "s/context", kind="time"),
    )

    dim: int = 384
    layers: int = 6
    heads: int = 12
    context_tokens: int = 128
    reply_tokens: int = 40
    candidates: tuple[int, ...] = (10, 100, 1000, 10_000)
    contexts: int = 8
    timed: bool = False
    repeats: int = 7
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if min(self.contexts, self.repeats, *self.candidates) < 1:
            raise UserError("candidates, contexts and repeats count, 1 or more")

    @property
    def selection(self) -> ResponseSelection:
        """The task whose contexts and models these are."""
        return ResponseSelection(
            dim=self.dim, layers=self.layers, heads=self.heads, context_tokens=self.context_tokens,
            reply_tokens=self.reply_tokens, start="random", samples_judged=self.contexts,
        )  # fmt: skip

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.timed and run.device.type != "cuda":
            return "seconds are of a GPU, --device cuda"
        return self.selection.unsupported_reason(run)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 1.0, f"{arm.key}: cost of scoring", {"arm": arm.key})
            for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, task = run.arm_of(unit), self.selection
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(run.seed)
            model = recipe_of(run, arm).build(task, FieldTraining(task, run, arm).width()).to(run.device).eval()
        for sample in task.judged("test"):
            batch = to_device(task.collate([_alone(sample)]), run.device)
            if self.timed:
                yield from self._seconds(run, arm, model, batch, sample.name)
            else:
                yield from self._counted(arm, model, batch, sample.name)

    def _counted(self, arm: Arm, model: Any, batch: Batch, name: str) -> Iterator[Row]:
        if isinstance(model, CrossEncoder):
            pair = _operations(lambda: model(batch))
            for count in self.candidates:
                yield self.row("operations", arm, count * pair / 1e9, name, at={"candidates": count})
            return
        reading = _operations(lambda: model.replies(batch["replies"], batch["reply_mask"]))
        yield self.row("reading", arm, reading / 1e9, name)
        for count in self.candidates:
            kept = torch.zeros(count, self.dim)
            done = _operations(lambda kept=kept: _scored(model, batch, kept))
            yield self.row("operations", arm, done / 1e9, name, at={"candidates": count})

    def _seconds(self, run: RunContext, arm: Arm, model: Any, batch: Batch, name: str) -> Iterator[Row]:
        for count in self.candidates:
            kept = torch.randn(count, self.dim, device=run.device)
            found = []
            for _ in range(self.repeats + 1):  # the first warms up
                run.synchronise()
                begun = time.perf_counter()
                with torch.no_grad(), autocast(run.device):
                    if isinstance(model, CrossEncoder):
                        _paired(model, batch, count)
                    else:
                        _scored(model, batch, kept)
                run.synchronise()
                found.append(time.perf_counter() - begun)
            value = sum(found[1:]) / self.repeats
            yield self.row("seconds", arm, value, name, at={"candidates": count})


def _alone(sample: Sample) -> Sample:
    """A context with its own reply alone."""
    return Sample(sample.name, sample.group, sample.part, sample.inputs, sample.target, {"others": ()})


def _scored(model: DualEncoder, batch: Batch, kept: Tensor) -> Tensor:
    """Scores ``[1, C]`` of the vectors of replies that were kept ``[C, D]``."""
    vectors, there = model.contexts(batch["inputs"], batch["mask"])
    scores: Tensor = model.match.scores(vectors, there, kept[None].to(vectors.dtype))
    return scores


def _paired(model: CrossEncoder, batch: Batch, count: int) -> None:
    """As many pairs as said of the context and its own reply."""
    for first in range(0, count, _PAIRS):
        zeros = torch.zeros(min(_PAIRS, count - first), dtype=torch.long, device=batch["inputs"].device)
        model.pairs(batch, zeros, zeros)


@torch.no_grad()
def _operations(run: Any) -> float:
    """Floating-point operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(counter.get_total_flops())
