# SPDX-License-Identifier: Apache-2.0
"""The page of attention maps: what was generated, and over it what each word was given, in one file without network."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from ..html import LEVELS, colours, data_uri, filled, number, pixels

__all__ = ["Maps", "render", "write_page"]

_BYTES = 8_000_000  # that all maps may take in the page, before those of layers and steps are made coarser
_PNG = 400_000  # bytes above which a picture is stored as JPEG
Array = np.ndarray[Any, np.dtype[Any]]


class Maps(Protocol):
    """What is drawn, as :class:`manyheads.diffusion.token_maps.WordMaps` has it: maps ``[rows, C, frames, h, w]``."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def units(self) -> tuple[str, ...]: ...
    @property
    def maps(self) -> Mapping[str, Any]: ...
    @property
    def layers(self) -> Mapping[str, Mapping[int, Any]]: ...
    @property
    def steps(self) -> Mapping[str, Mapping[int, Any]]: ...


def write_page(
    path: str | Path, images: Sequence[Any], maps: Maps, *, title: str = "Attention maps", prompts: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write the page: every map laid over its image, with branches, layers, steps, frames and scales to choose.

    Args:
        path: of the HTML file.
        images: what was generated, one for each row of the maps: a PIL image or ``[H, W, 3]`` (``uint8``, or floats
            from 0 to 1); for a video a sequence of them, or ``[F, H, W, 3]``.
        maps: as :func:`manyheads.diffusion.token_maps.maps` gives them.
        title: heading of the page.
        prompts: of the rows, if known.
        facts: what else is known of the run: model, seed, strategies, versions.

    Returns:
        The path.

    Raises:
        UserError: images and maps do not have the same number of rows.
    """
    path = Path(path)
    write_atomically(path, render(images, maps, title=title, prompts=prompts, facts=facts))
    return path


def render(
    images: Sequence[Any], maps: Maps, *, title: str = "Attention maps", prompts: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The page of :func:`write_page` as HTML. Names, prompts and facts are escaped."""
    whole = {branch: _array(x) for branch, x in maps.maps.items()}
    counts = sorted({len(x) for x in whole.values()})
    if counts != [len(images)]:
        raise UserError(f"{len(images)} images for maps of {counts} rows; give one image for each row")
    if prompts and len(prompts) != len(images):
        raise UserError(f"{len(prompts)} prompts for {len(images)} images; give one for each")
    branches = sorted(whole, key=lambda branch: branch != "cond")
    fine, kept = _fitting(whole, maps)
    views = {
        branch: {
            "mean": _grid(whole[branch]),
            **{kind: {str(n): _grid(x) for n, x in kept[kind].get(branch, {}).items()} for kind in kept},
        }
        for branch in branches
    }
    frames = [_frames(image) for image in images]
    tops = [
        max((one["high"] for view in views.values() for one in _each(view, c)), default=1.0)
        for c in range(len(maps.names))
    ]
    data = {
        "names": maps.names, "units": maps.units, "branches": branches, "views": views, "tops": tops,
        "colours": colours(False), "pictures": [[uri for uri, _ in row] for row in frames],
        "frames": next(iter(whole.values())).shape[2],
    }  # fmt: skip
    rows = [
        {
            "number": r, "prompt": prompts[r] if prompts else "", "picture": frames[r][0][0], "size": frames[r][0][1],
            "cards": [_card(whole[branches[0]][r, c], maps.names[c], maps.units[c]) for c in range(len(maps.names))],
        }
        for r in range(len(images))
    ]  # fmt: skip
    steps = sorted({n for by in maps.steps.values() for n in by})
    layers = sorted({n for by in maps.layers.values() for n in by})
    return filled(
        "maps.html.j2", "manyheads.generate", script="maps.js", data=data, title=title, rows=rows, facts=facts or {},
        branches=branches, steps=steps, layers=layers, frames=data["frames"], units=list(dict.fromkeys(maps.units)),
        grid=" x ".join(map(str, next(iter(whole.values())).shape[-2:])), coarse=not fine,
        ramp=data_uri(pixels(np.arange(LEVELS, dtype=np.uint8)[None])),
    )  # fmt: skip


def _array(x: Any) -> Array:
    return np.asarray(x, dtype=np.float64)


def _fitting(
    whole: Mapping[str, Array], maps: Maps
) -> tuple[bool, dict[str, dict[str, dict[int, Array]]]]:  # fmt: skip
    """The maps of layers and of steps, made coarser until all fit; and whether they are as fine as they were."""
    kept = {
        kind: {branch: {n: _array(x) for n, x in by.items()} for branch, by in given.items()}
        for kind, given in (("layers", maps.layers), ("steps", maps.steps))
    }
    fine = True
    room = _BYTES - sum(x.size for x in whole.values()) * 4 / 3
    while True:
        parts = [x for branches in kept.values() for by in branches.values() for x in by.values()]
        if not parts or sum(x.size for x in parts) * 4 / 3 <= room or max(parts[0].shape[-2:]) <= 8:
            return fine, kept
        fine = False
        kept = {
            kind: {branch: {n: _halved(x) for n, x in by.items()} for branch, by in branches.items()}
            for kind, branches in kept.items()
        }


def _halved(x: Array) -> Array:
    """Means of 2 x 2 cells; an odd last row or column stands for itself."""
    *rest, high, wide = x.shape
    x = np.pad(x, [*[(0, 0)] * len(rest), (0, high % 2), (0, wide % 2)], mode="edge")
    return np.asarray(x.reshape(*rest, -(-high // 2), 2, -(-wide // 2), 2).mean((-3, -1)))


def _grid(x: Array) -> dict[str, Any]:
    """``[rows, C, frames, h, w]`` for the script: of each map its ends, and 0 to 255 between them."""
    return {"h": x.shape[-2], "w": x.shape[-1], "maps": [[_levels(one) for one in row] for row in x]}


def _levels(x: Array) -> dict[str, Any] | None:
    if not np.isfinite(x).all():
        return None
    low, high = float(x.min()), float(x.max())
    levels = np.rint((x - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    return {"low": low, "high": high, "data": base64.b64encode(levels.tobytes()).decode()}


def _each(view: Mapping[str, Any], c: int) -> list[dict[str, Any]]:
    """The maps of one name in a branch, over rows, layers and steps."""
    grids = [view["mean"], *view["layers"].values(), *view["steps"].values()]
    return [row[c] for grid in grids for row in grid["maps"] if row[c] is not None]


def _frames(image: Any) -> list[tuple[str, tuple[int, int]]]:
    """An image or the frames of a video as sources, each with its width and height."""
    made = np.stack([np.asarray(one) for one in image]) if isinstance(image, (list, tuple)) else np.asarray(image)
    made = made[None] if made.ndim == 3 else made
    if made.ndim != 4 or made.shape[3] not in (1, 3, 4):
        raise UserError(f"an image is [H, W, 3] and a video [F, H, W, 3], not {list(made.shape)}")
    made = np.repeat(made, 3, 3) if made.shape[3] == 1 else made[..., :3]
    if made.dtype != np.uint8:
        made = (np.nan_to_num(made.astype(np.float64)).clip(0, 1) * 255).round().astype(np.uint8)
    return [(_source(one), (one.shape[1], one.shape[0])) for one in made]


def _source(pixels_: Array) -> str:
    """``[H, W, 3]`` as PNG, or as JPEG where that is large."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_).save(file, "PNG", optimize=True)
    if len(file.getvalue()) <= _PNG:
        return data_uri(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(pixels_).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _card(x: Array, name: str, unit: str) -> dict[str, Any]:
    """One map as it stands before any script runs: the first frame of the mean over layers and steps."""
    known = bool(np.isfinite(x).all())
    low, high = (float(x.min()), float(x.max())) if known else (math.nan, math.nan)
    part = (x[0] - low) / ((high - low) or 1.0)
    levels = np.clip(np.nan_to_num(part) * LEVELS, 0, LEVELS - 1).astype(np.uint8)
    row, column = np.unravel_index(int(np.nan_to_num(x[0]).argmax()), x[0].shape)
    return {
        "name": name, "unit": unit, "map": data_uri(pixels(levels)) if known else "",
        "said": f"greatest {number(float(x[0].max()))} in row {row}, column {column}; mean {number(float(x[0].mean()))}"
        if known else "not seen here",
        "ends": [number(v) for v in (low, (low + high) / 2, high)],
    }  # fmt: skip
