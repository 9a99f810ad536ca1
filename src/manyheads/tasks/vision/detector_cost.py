# SPDX-License-Identifier: Apache-2.0
"""What the encoder of a detector costs for an image: operations counted, and seconds on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...errors import UserError
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...training.fit import autocast
from .._field_training import FieldTraining, recipe_of
from .object_detection import ObjectDetection

__all__ = ["DetectorCost"]


@dataclass(frozen=True, kw_only=True)
class DetectorCost(Task):
    """Detectors of ``object_detection`` with random weights, of the sizes of DINO unless the fields say others.

    Operations are those of matrix products; what deformable attention reads between cells is not among them. Scoring
    tokens is part of an encoder. Images are noise, for no count depends on what is in them.

    Attributes:
        dim, layers, heads: of every model.
        width: of the baseline's feed-forward networks; other arms have as many parameters.
        height, across, stride, levels: of the canvas and its maps.
        images: that are measured.
        timed: seconds on a GPU; operations else.
        repeats: of a measurement of seconds.
        only: names of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("encoder", "operations of the encoder", "GFLOP/image"),
        Metric("detector", "operations of the whole detector", "GFLOP/image"),
        Metric("seconds", "seconds of the encoder", "s/image", kind="time"),
    )

    dim: int = 256
    layers: int = 6
    heads: int = 8
    width: int = 2048
    height: int = 480
    across: int = 640
    stride: int = 8
    levels: int = 4
    images: int = 2
    timed: bool = False
    repeats: int = 7
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if min(self.images, self.repeats) < 1:
            raise UserError("images and repeats count, 1 or more")

    @property
    def detection(self) -> ObjectDetection:
        """The task whose models these are."""
        return ObjectDetection(
            dataset="planted", dim=self.dim, layers=self.layers, heads=self.heads, width=self.width,
            height=self.height, across=self.across, stride=self.stride, levels=self.levels, queries=100,
        )  # fmt: skip

    def unsupported_reason(self, run: RunContext) -> str | None:
        return "seconds are of a GPU, --device cuda" if self.timed and run.device.type != "cuda" else None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 1.0, f"{arm.key}: cost of detecting", {"arm": arm.key})
            for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, task = run.arm_of(unit), self.detection
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(run.seed)
            model: Any = recipe_of(run, arm).build(task, FieldTraining(task, run, arm).width())
        model = model.to(run.device).eval().requires_grad_(False)
        extent = torch.ones(1, 2, device=run.device)
        for i in range(self.images):
            image = torch.randn(1, 3, self.height, self.across, generator=run.torch_rng(image=i)).to(run.device)
            if self.timed:
                yield self.row("seconds", arm, self._seconds(run, model, image, extent), f"{i}")
                continue
            for name, value in _operations(model, image, extent).items():
                yield self.row(name, arm, value, f"{i}")

    def _seconds(self, run: RunContext, model: Any, image: Tensor, extent: Tensor) -> float:
        """The median; the first calls warm up."""
        found = []
        with torch.no_grad(), autocast(run.device):
            maps = model.maps(image, extent)
            for _ in range(self.repeats + 2):
                run.synchronise()
                begun = time.perf_counter()
                model.encoder(maps, model.embed)
                run.synchronise()
                found.append(time.perf_counter() - begun)
        return sorted(found[2:])[self.repeats // 2]


@torch.no_grad()
def _operations(model: Any, image: Tensor, extent: Tensor) -> dict[str, float]:
    """GFLOP of the matrix products and convolutions, by the metric of what they are of."""
    maps = model.maps(image, extent)
    calls: dict[str, Callable[[], Any]] = {
        "encoder": lambda: model.encoder(maps, model.embed),
        "detector": lambda: model(image, extent),
    }
    found = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        found[name] = counter.get_total_flops() / 1e9
    return found
