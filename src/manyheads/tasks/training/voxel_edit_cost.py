# SPDX-License-Identifier: Apache-2.0
"""What an editor of voxels costs under each arm: parameters, operations, seconds of an edit; untrained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...data.voxels import draw
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...models.voxels import VoxelEditor
from ._editors import EditorTask

__all__ = ["Operations", "VoxelEditCost", "operations"]


class Operations(NamedTuple):
    """Floating-point operations of one evaluation of a denoiser, for one object.

    Attributes:
        attention: of products of queries with keys, and of weights with values.
        products: of all matrix products.
    """

    attention: int
    products: int


@dataclass(frozen=True, kw_only=True)
class VoxelEditCost(EditorTask):
    """One round is one batch of edits under every arm in turn, begun with another arm each round.

    Attributes:
        edits: of a batch.
        rounds: repetitions.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("parameters", "parameters of an editor"),
        Metric("attention_flops", "operations of attention, one evaluation", "FLOP"),
        Metric("flops", "operations of all matrix products, one evaluation", "FLOP"),
        Metric("seconds", "seconds of an edit", "s", kind="time"),
    )

    edits: int = 16
    rounds: int = 4

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "all", 1.0, "cost of editors", {})]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arms = self.editors(run)
        made = {arm.key: self.fresh(run, arm, run.seeds[0]).eval() for arm in arms}
        for arm in arms:
            editor = made[arm.key]
            yield self.row("parameters", arm, editor.parameters_held, "0")
            counted = operations(editor)
            yield self.row("attention_flops", arm, counted.attention, "0")
            yield self.row("flops", arm, counted.products, "0")
        given = draw(self.edits, self.side, run.torch_rng(part="cost"), device=run.device)
        noise = torch.randn(given.source.shape, generator=run.torch_rng(part="cost noise")).to(run.device)
        for turn in range(-1, self.rounds):  # the first is not counted
            first = turn % len(arms)
            for arm in arms[first:] + arms[:first]:
                run.synchronise()
                start = time.perf_counter()
                made[arm.key].edited(given.source, given.instruction, noise, self.denoising)
                run.synchronise()
                if turn >= 0:
                    yield self.row("seconds", arm, (time.perf_counter() - start) / self.edits, f"{turn}")
        run.advance(unit.cost)


@torch.no_grad()
def operations(editor: VoxelEditor) -> Operations:
    """Counted while one object is denoised once, attention by plain matrix products."""
    side, device = editor.config.side, editor.words.weight.device
    x = torch.zeros(1, 1, side, side, side, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        editor(x, x, torch.zeros(1, device=device), torch.zeros(1, dtype=torch.long, device=device))
    found = counter.get_flop_counts()["Global"]
    return Operations(int(found.get(torch.ops.aten.bmm, 0)), int(sum(found.values())))
