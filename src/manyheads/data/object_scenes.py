# SPDX-License-Identifier: Apache-2.0
"""Pictures of several objects, films in which objects come one after the other, and scenes in depth; all is known.

The objects of :mod:`manyheads.data.scenes` stand in the cells of a grid before a photograph. Each of the eight is there
with probability one half, on its own, so that what was said of one tells nothing of another; no two share a cell. In a
film every frame shows one object, each at most once. A scene in depth is a picture for each distance, nearest first, as
a camera that measures depth parts what it sees; what is further is paler. Nothing is seen twice.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from ..errors import UserError
from .scenes import BACKDROPS, OBJECTS, photographs, sprites

__all__ = ["Depths", "Film", "Picture", "draw_depths", "draw_films", "draw_pictures", "pixel_labels"]

Split = Literal["train", "test"]
_HAZE = 0.6  # how far towards white the furthest distance is


@dataclass(frozen=True, slots=True)
class Picture:
    """Pictures.

    Attributes:
        images: float32 in -1..1, ``[N, 3, side, side]``.
        cells: cell of each object in raster order, int64 ``[N, 8]``; -1 where it is not there.
    """

    images: Tensor
    cells: Tensor


@dataclass(frozen=True, slots=True)
class Film:
    """Films.

    Attributes:
        images: float32 in -1..1, ``[N, F, 3, side, side]``.
        objects: that each frame shows, int64 ``[N, F]``.
        cells: where, int64 ``[N, F]``.
    """

    images: Tensor
    objects: Tensor
    cells: Tensor


@dataclass(frozen=True, slots=True)
class Depths:
    """Scenes in depth.

    Attributes:
        images: float32 in -1..1, ``[N, P, 3, side, side]``, of the nearest distance first.
        objects: those that are there, int64 ``[N, K]``.
        places: distance, row and column of each, int64 ``[N, K, 3]``.
    """

    images: Tensor
    objects: Tensor
    places: Tensor


def draw_pictures(
    count: int, generator: Generator, *, grid: int, size: int, split: Split = "train", there: Tensor | None = None
) -> Picture:
    """Draw pictures of ``grid x grid`` cells of ``size`` pixels.

    Args:
        count: N.
        generator: on the CPU.
        grid: cells of a side.
        size: pixels of a cell.
        split: of the photographs.
        there: which objects each shows, bool ``[N, 8]``; each with probability one half if None.

    Raises:
        UserError: there are fewer cells than objects.
    """
    if grid * grid < len(OBJECTS):
        raise UserError(f"{len(OBJECTS)} objects need as many cells; give a grid of 3 or more, not {grid}")
    if there is None:
        there = torch.rand(count, len(OBJECTS), generator=generator) < 0.5
    where = torch.rand(count, grid * grid, generator=generator).argsort(1)[:, : len(OBJECTS)]
    images = _backdrops(count, grid * size, generator, split)
    rows, kinds = there.nonzero().unbind(1)
    images = _over(images, rows, kinds, where[rows, kinds], grid, size)
    return Picture(images * 2 - 1, torch.where(there, where, -1))


def draw_films(
    count: int, frames: int, generator: Generator, *, grid: int, size: int, split: Split = "train"
) -> Film:  # fmt: skip
    """Draw films of ``frames`` frames, at most eight, each of ``grid x grid`` cells of ``size`` pixels."""
    shown = torch.rand(count, len(OBJECTS), generator=generator).argsort(1)[:, :frames]
    back = _backdrops(count, grid * size, generator, split)
    made, cells, rows = [], [], torch.arange(count)
    for frame in range(frames):
        cells.append(torch.randint(grid * grid, (count,), generator=generator))
        made.append(_over(back, rows, shown[:, frame], cells[-1], grid, size))
    return Film(torch.stack(made, 1) * 2 - 1, shown, torch.stack(cells, 1))


def draw_depths(
    count: int, generator: Generator, *, planes: int, grid: int, size: int, objects: int, split: Split = "train"
) -> Depths:
    """Draw scenes of ``planes`` distances with ``grid x grid`` cells of ``size`` pixels each, and in them ``objects``.

    Every object has a place of its own; all distances show the same photograph.

    Raises:
        UserError: there are fewer objects, or fewer places than are asked for.
    """
    if not 1 <= objects <= min(len(OBJECTS), planes * grid * grid):
        raise UserError(f"there are {len(OBJECTS)} objects and {planes * grid * grid} places, not {objects}")
    shown = torch.rand(count, len(OBJECTS), generator=generator).argsort(1)[:, :objects]
    where = torch.rand(count, planes * grid * grid, generator=generator).argsort(1)[:, :objects]
    plane, cell = where // grid**2, where % grid**2
    back, made = _backdrops(count, grid * size, generator, split), []
    for depth in range(planes):
        rows, which = (plane == depth).nonzero().unbind(1)
        image = _over(back, rows, shown[rows, which], cell[rows, which], grid, size)
        made.append(image + _HAZE * depth / max(1, planes - 1) * (1 - image))
    places = torch.stack([plane, cell // grid, cell % grid], 2)
    return Depths(torch.stack(made, 1) * 2 - 1, shown, places)


def _backdrops(count: int, side: int, generator: Generator, split: Split) -> Tensor:
    """Photographs in 0..1, ``[count, 3, side, side]``."""
    stock = photographs(split)
    kind = torch.randint(len(BACKDROPS), (count,), generator=generator).tolist()
    which = torch.rand(count, generator=generator).tolist()
    chosen = torch.stack([stock[k][int(w * len(stock[k]))] for k, w in zip(kind, which, strict=True)])
    return interpolate(chosen.float() / 255, size=(side, side), mode="bilinear", antialias=True)


def _over(images: Tensor, rows: Tensor, kinds: Tensor, cells: Tensor, grid: int, size: int) -> Tensor:
    """``images [N, 3, side, side]`` with objects ``kinds [K]`` in ``cells [K]`` of the images ``rows [K]``."""
    parts = images.unflatten(3, (grid, size)).unflatten(2, (grid, size)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    cover, parts = sprites(size)[kinds], parts.clone()
    parts[rows, cells] = cover[:, :3] + (1 - cover[:, 3:]) * parts[rows, cells]
    whole: Tensor = parts.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return whole


def pixel_labels(picture: Picture, grid: int, size: int) -> Tensor:
    """What each pixel shows, int64 ``[N, side, side]``: 0 for the photograph, else an object's number from 1 on.

    A pixel is an object's where the object covers more than half of it.
    """
    count = len(picture.cells)
    parts = torch.zeros(count, grid * grid, size, size, dtype=torch.long)
    rows, kinds = (picture.cells >= 0).nonzero().unbind(1)
    covered = (sprites(size)[:, 3] > 0.5) * torch.arange(1, len(OBJECTS) + 1)[:, None, None]
    parts[rows, picture.cells[rows, kinds]] = covered[kinds]
    whole: Tensor = parts.unflatten(1, (grid, grid)).transpose(2, 3).flatten(1, 2).flatten(2)
    return whole
