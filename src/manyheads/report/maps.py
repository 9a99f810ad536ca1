# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads generate --maps`` shows: what was generated, and over it what each word was given."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from ..formatting import number
from .colours import Array, Scale, colours, data_uri, halved, pixels, ramp
from .page import Facts, Headline, Overlays, Page, Section, Text

__all__ = ["Maps", "card", "page", "sources"]

_BYTES = 350_000  # that all maps may take in the page, before those of layers and steps are made coarser
_PICTURES = 500_000  # bytes that all images may take in the page
_UNITS = {
    "share of attention": "A word's map is the share of each image token's attention that goes to the word.",
    "times a uniform share": "Attention received, and what an image token looks at, are multiples of a uniform share.",
}


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


def page(
    images: Sequence[Any], maps: Maps, *, title: str = "Attention maps", prompts: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Page:  # fmt: skip
    """Every map laid over its image, with branches, layers, steps, frames and scales to choose.

    Args:
        images: what was generated, one for each row of the maps: a PIL image or ``[H, W, 3]`` (``uint8``, or floats
            from 0 to 1); for a video a sequence of them, or ``[F, H, W, 3]``.
        maps: as :func:`manyheads.diffusion.token_maps.maps` gives them.
        title: heading of the page.
        prompts: of the rows, if known.
        facts: what else is known of the run: model, seed, strategies, versions.

    Raises:
        UserError: images and maps do not have the same number of rows.
    """
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
    films = [_film(image) for image in images]
    frames = sources(films)
    tops = [
        max((one["high"] for view in views.values() for one in _each(view, c)), default=1.0)
        for c in range(len(maps.names))
    ]
    count = next(iter(whole.values())).shape[2]
    data = {
        "names": maps.names, "units": maps.units, "branches": branches, "views": views, "tops": tops,
        "colours": colours(False), "pictures": frames, "frames": count,
    }  # fmt: skip
    colour_row, sections = ramp(), []
    for r, film in enumerate(films):
        over = [card(whole[branches[0]][r, c], maps.names[c], maps.units[c]) for c in range(len(maps.names))]
        name = prompts[r] if prompts else f"{'Video' if count > 1 else 'Image'} {r + 1}"
        size = (film.shape[2], film.shape[1])
        sections.append(Section(name, [Overlays(r, frames[r][0], size, over, colour_row)]))
    grid = " x ".join(map(str, next(iter(whole.values())).shape[-2:]))
    rows = [*((name, value, "") for name, value in (facts or {}).items()), ("branches", ", ".join(branches), "")]
    care = "" if fine else "; maps of single layers and steps are coarser here than they were"
    read = f"A map says where attention went, not what caused a pixel. Values are read to 1/255 of a map's range{care}."
    return Page(
        title, title, f"Means over heads, layers and steps, on a grid of {grid} tokens. "
        + " ".join(_UNITS[unit] for unit in dict.fromkeys(maps.units) if unit in _UNITS),
        [Headline(_found(whole[branches[0]][0, c], unit), name)
         for c, (name, unit) in enumerate(zip(maps.names, maps.units, strict=True))],
        [*sections, Section("How it was made", [Facts(rows), Text(read)])], "maps.js", data,
        {
            "branches": branches, "layers": sorted({n for by in maps.layers.values() for n in by}),
            "steps": sorted({n for by in maps.steps.values() for n in by}), "frames": count,
        },
    )  # fmt: skip


def _found(x: Array, unit: str) -> str:
    """Where a map ``[frames, h, w]`` of the first image is greatest, in words."""
    if not np.isfinite(x).all():
        return "not seen in the first image"
    first = x[0]
    row, column = np.unravel_index(int(first.argmax()), first.shape)
    down = ("upper", "middle", "lower")[int(3 * row // first.shape[0])]
    along = ("left", "centre", "right")[int(3 * column // first.shape[1])]
    times = float(first.max() / first.mean()) if first.mean() > 0 else math.nan
    return (
        f"in the first image greatest in the {down} {along}, {number(float(first.max()))} ({unit}), "
        f"{number(times)} times its mean"
    )


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
            kind: {branch: {n: halved(x) for n, x in by.items()} for branch, by in branches.items()}
            for kind, branches in kept.items()
        }


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


def _film(image: Any) -> Array:
    """An image or the frames of a video as ``[F, H, W, 3]`` of ``uint8``."""
    made = np.stack([np.asarray(one) for one in image]) if isinstance(image, (list, tuple)) else np.asarray(image)
    made = made[None] if made.ndim == 3 else made
    if made.ndim != 4 or made.shape[3] not in (1, 3, 4):
        raise UserError(f"an image is [H, W, 3] and a video [F, H, W, 3], not {list(made.shape)}")
    made = np.repeat(made, 3, 3) if made.shape[3] == 1 else made[..., :3]
    if made.dtype != np.uint8:
        made = (np.nan_to_num(made.astype(np.float64)).clip(0, 1) * 255).round().astype(np.uint8)
    return np.asarray(made)


def sources(films: Sequence[Array]) -> list[list[str]]:
    """The frames of each row as sources of images: PNG, or as JPEG and smaller until all fit the page."""
    for quality, part in ((None, 1), (90, 1), (80, 1), *((80, 2**n) for n in range(1, 12))):
        made = [[_source(frame, quality, part) for frame in film] for film in films]
        if sum(len(row[0]) + sum(map(len, row)) for row in made) <= _PICTURES:  # the first stands in the page itself
            break
    return made


def _source(pixels_: Array, quality: int | None, part: int) -> str:
    """``[H, W, 3]`` as PNG, or as JPEG of a quality with sides divided by ``part``."""
    from PIL import Image

    file, image = io.BytesIO(), Image.fromarray(pixels_)
    if quality is None:
        image.save(file, "PNG", optimize=True)
        return data_uri(file.getvalue())
    image.resize((max(1, image.width // part), max(1, image.height // part))).save(file, "JPEG", quality=quality)
    return data_uri(file.getvalue(), "jpeg")


def card(x: Array, name: str, unit: str, log: bool = False) -> dict[str, Any]:
    """One map as it stands before any script runs: the first frame of the mean over layers and steps.

    ``log``: in logarithmic colours; all values are above 0.
    """
    known = bool(np.isfinite(x).all())
    low, high = (float(x.min()), float(x.max())) if known else (math.nan, math.nan)
    scale = Scale(low, high if high > low else low + 1, log=log)
    row, column = np.unravel_index(int(np.nan_to_num(x[0]).argmax()), x[0].shape)
    return {
        "name": name, "unit": unit, "map": data_uri(pixels(scale.levels(x[0]))) if known else "",
        "said": f"greatest {number(float(x[0].max()))} in row {row}, column {column}; mean {number(float(x[0].mean()))}"
        if known else "not seen here",
        "ends": [number(v) for v in (low, math.sqrt(low * high) if log else (low + high) / 2, high)],
    }  # fmt: skip
