# SPDX-License-Identifier: Apache-2.0
"""An object filled into a photograph of unseen colours: does the hole get its colours, and the object its shape?

The photograph, which no model was trained on, is given a style that no training image has: its colours are turned
about the grey axis by 60 to 300 degrees, and a gamma of 0.45 to 0.7 or 1.4 to 2.2 is put on. The hole is a square of 20
pixels in the corner that the caption names. The object of 14 pixels stands within the outer 16, so that the 4 inner
rows and columns of the hole have to show background alone: their colours in Lab are compared with those of the 4 rows
and columns just outside, and the seam lies between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import pi
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, Tensor

from ...diffusion._inpainting import Canvas, Inpainting
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...models.judge import frechet
from ._image_task import ImageTask, judge_of

if TYPE_CHECKING:
    from ...experiment import Arm

__all__ = ["Inpaint", "colour", "seam", "structure", "styled", "to_lab"]

HOLE, OBJECT, BAND = 20, 16, 4  # pixels from the corner: of the hole, of the object's quarter; around both


@dataclass(frozen=True, kw_only=True)
class Inpaint(ImageTask):
    """Every arm fills the same holes from the same noise. An arm's option ``steps`` is its own number of steps.

    ``truth=True`` in an arm's options shows what is there: the object on the photograph in its style, made by no model.
    """

    alone: ClassVar[bool] = True
    known_contents: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("colour", "colour distance of hole and surroundings, Lab", what="2-Wasserstein, of background alone"),
        Metric("seam", "gradient across the seam, log of its ratio to that outside", what="0 where there is no seam"),
        Metric("object", "object that the caption says", higher=True, kind="share"),
        Metric(
            "structure",
            "correlation with the object's own light",
            higher=True,
            what="of the pixels it covers, at the best of the places where it may stand",
        ),
        Metric("changed", "share of the kept pixels that changed"),
        Metric("seconds", "seconds an image", "s", kind="time"),
    )

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...data import scenes

        seed, first, last = (unit.params[name] for name in ("seed", "first", "last"))
        source = run.torch_rng(photographs=seed)
        sample = scenes.draw("scenes", self.samples, source, "test")
        assert sample.photographs is not None
        photographs = styled(sample.photographs / 2 + 0.5, source)
        truth = sample.images / 2 + 0.5 + (1 - sample.alpha) * (photographs - sample.photographs / 2 - 0.5)
        truth = torch.where(sample.alpha > 0, truth, photographs)
        part = slice(first, last)
        labels, truth, given = sample.labels[part], truth[part], photographs[part]
        places = labels[:, 1]
        hole = corner(places, HOLE)
        canvas = Canvas(hole, torch.where(hole > 0.5, 0.5, given))  # what is under the hole is not known
        run.kept("warm-up of inpainting", lambda: self.filled(run, run.baseline, seed, first, last, labels, canvas))
        turn = first // self.batch % len(run.arms)
        for arm in run.arms[turn:] + run.arms[:turn]:
            run.synchronise()
            start = time.perf_counter()
            made = truth if arm.options.get("truth") else self.filled(run, arm, seed, first, last, labels, canvas)
            run.synchronise()
            seconds = (time.perf_counter() - start) / len(labels)
            apart = ((made != given) & (hole < 0.5)).float().mean((1, 2, 3))
            found = {
                "colour": colour(made, places), "seam": seam(made, places), "changed": apart,
                "object": judge_of(run).see(made).right(labels, "object"), "structure": structure(made, labels),
            }  # fmt: skip
            yield from self.judged(arm, seed, found, first)
            if not arm.options.get("truth"):
                yield self.row("seconds", arm, seconds, f"{seed}/{first}", seed=seed)
            run.advance(unit.cost / len(run.arms))

    def filled(
        self, run: RunContext, arm: Arm, seed: int, first: int, last: int, labels: Tensor, canvas: Canvas
    ) -> Tensor:  # fmt: skip
        """The images of an arm."""
        acting = [replace(s, canvas=canvas) if isinstance(s, Inpainting) else s for s in arm.strategies]
        task = replace(self, steps=int(arm.options.get("steps", self.steps)))
        return task.images(run, arm, seed, first, last, acting=acting, labels=labels)


def styled(images: Tensor, generator: Generator) -> Tensor:
    """Images ``[N, 3, H, W]`` in 0..1, each with its colours turned about the grey axis and a gamma of its own."""
    random = torch.rand(3, len(images), generator=generator, dtype=torch.float64)
    angle = (random[0] * 4 / 3 + 1 / 3) * pi
    gamma = torch.where(random[1] < 0.5, 0.45 + 0.25 * random[2], 1.4 + 0.8 * random[2])
    grey = torch.full((3,), 3**-0.5, dtype=torch.float64)
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) * 3**-0.5
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turn = cos * torch.eye(3, dtype=torch.float64) + sin * cross + (1 - cos) * torch.outer(grey, grey)
    turned = torch.einsum("nij,njhw->nihw", turn, images.double()).clamp(0, 1)
    return (turned ** gamma[:, None, None, None]).float()


def corner(places: Tensor, size: int) -> Tensor:
    """1 in the square of ``size`` pixels in the corner of each place, float32 ``[N, 1, 32, 32]``."""
    from ...data.scenes import SIDE

    reach = torch.arange(SIDE)
    near = torch.stack([reach < size, reach >= SIDE - size])  # from the one end, from the other
    return (near[places // 2][:, :, None] & near[places % 2][:, None]).float()[:, None]


def to_lab(images: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB images ``[N, 3, H, W]`` in 0..1, in float64."""
    x = images.double()
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=torch.float64,
    )
    xyz = torch.einsum("ij,njhw->nihw", matrix / matrix.sum(1, keepdim=True), linear)  # white is 1, 1, 1
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def colour(images: Tensor, places: Tensor) -> Tensor:
    """2-Wasserstein distance in Lab ``[N]``, of Gaussians, of the background within the hole and that around it."""
    quarter, hole, around = (corner(places, size)[:, 0] > 0.5 for size in (OBJECT, HOLE, HOLE + BAND))
    found = []
    for each, inside, outside in zip(to_lab(images), hole & ~quarter, around & ~hole, strict=True):
        found.append(max(frechet(each[:, inside].T, each[:, outside].T), 0.0) ** 0.5)
    return torch.tensor(found, dtype=torch.float64)


def structure(images: Tensor, labels: Tensor) -> Tensor:
    """How the light of an object's pixels goes with that of the object as it is drawn: ``[N]``, -1 to 1.

    A correlation over the pixels that the object covers wholly, so that another brightness or contrast changes nothing;
    the largest over the places where the object may stand in its quarter ``labels [N, 3]``.
    """
    from ...data.scenes import OBJECT as size
    from ...data.scenes import SIDE, sprites

    luma = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    light, drawn = (torch.einsum("c,nchw->nhw", luma, x.double()) for x in (images, sprites(size)[:, :3]))
    cover = (sprites(size)[:, 3] > 0.99).double()
    found = []
    for each, (kind, place, _) in zip(light, labels.tolist(), strict=True):
        top, left = place // 2 * (SIDE // 2), place % 2 * (SIDE // 2)
        reach = range(SIDE // 2 - size + 1)
        parts = [each[top + i : top + i + size, left + j : left + j + size] for i in reach for j in reach]
        found.append(max(float(_correlation(part, drawn[kind], cover[kind])) for part in parts))
    return torch.tensor(found, dtype=torch.float64)


def _correlation(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Of two fields of numbers, weighted; 0 where one of them is flat."""
    weight = weight / weight.sum()
    x, y = (z - (weight * z).sum() for z in (x, y))
    return (weight * x * y).sum() / ((weight * x * x).sum() * (weight * y * y).sum()).sqrt().clamp(min=1e-12)


def seam(images: Tensor, places: Tensor) -> Tensor:
    """Log of the gradient across the hole's edge over that of the next two pairs of pixels outside: ``[N]``."""
    flat = images.double().clone()
    for i, place in enumerate(places.tolist()):  # every hole in the top left corner
        flat[i] = flat[i].flip([axis for axis, far in ((1, place // 2), (2, place % 2)) if far])

    def step(at: int) -> Tensor:
        """Mean difference of rows, and of columns, ``at - 1`` and ``at`` along the hole."""
        rows = (flat[:, :, at, :HOLE] - flat[:, :, at - 1, :HOLE]).abs().mean((1, 2))
        return (rows + (flat[:, :, :HOLE, at] - flat[:, :, :HOLE, at - 1]).abs().mean((1, 2))) / 2

    least = 1 / 255
    return ((step(HOLE) + least) / ((step(HOLE + 1) + step(HOLE + 2)) / 2 + least)).log()
