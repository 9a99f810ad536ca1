# SPDX-License-Identifier: Apache-2.0
"""Pictures side by side in one file: a sheet, a film strip, or a film of sheets.

Small pictures are enlarged by whole factors and not smoothed.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files import check_writable, write_asked
from .colours import Scale

__all__ = ["SUFFIXES", "Column", "check_out", "save", "sheets", "strip"]

Array = np.ndarray[Any, np.dtype[Any]]

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".pdf": "PDF"}
MOVING = frozenset({".gif", ".webp"})
_SMALL, _LARGE, _GAP, _LABEL = 160, 512, 8, 190  # pixels: sides of a tile, between tiles, width of a row's label
_MILLISECONDS, _STRIP = 125, 8  # of a frame; frames of a strip
_INK, _DIM, _PAPER = (28, 28, 32), (110, 110, 118), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: above it.
        note: below the title, in grey.
        pictures: one for each row: ``[F, H, W, 3]`` in 0..1, or ``[F, H, W]`` for a difference, drawn in colours.
    """

    title: str
    note: str
    pictures: Sequence[Array]


def check_out(out: Path) -> None:
    """Refuse a file that cannot be written, before anything is made.

    Raises:
        UserError: its ending is not known, it is a folder, or its folder can neither be written to nor made.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{out}: a grid is written as {', '.join(SUFFIXES)}; give --out one of these endings")
    check_writable(out, file=True)


def save(pages: Sequence[Image.Image], out: Path) -> None:
    """Write one page or a film of several; the file holds all of it or is what it was.

    Raises:
        UserError: it cannot be written.
    """
    kind, memory = SUFFIXES[out.suffix.lower()], io.BytesIO()
    more: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    if len(pages) > 1:
        more |= {"save_all": True, "append_images": pages[1:], "duration": _MILLISECONDS, "loop": 0}
    pages[0].save(memory, kind, **more)
    write_asked(out, memory.getvalue())


def sheets(columns: Sequence[Column], labels: Sequence[str], footer: str) -> list[Image.Image]:
    """A sheet for each frame: rows as ``labels`` name them, ``columns`` side by side."""
    top, frames = _top(columns), max(len(p) for column in columns for p in column.pictures)
    heads = [(column.title, column.note) for column in columns]
    return [
        _sheet(
            heads,
            labels,
            [[_tile(c.pictures[r][frame], top) for c in columns] for r in range(len(labels))],
            footer,
            top,
        )
        for frame in range(frames)
    ]


def strip(columns: Sequence[Column], labels: Sequence[str], footer: str) -> Image.Image:
    """One sheet of films: what were columns stand below each other for each row, frames beside each other."""
    top, frames = _top(columns), max(len(p) for column in columns for p in column.pictures)
    chosen = np.unique(np.linspace(0, frames - 1, min(frames, _STRIP)).round().astype(int))
    named = [
        (f"{column.title}\n{label}" if label else column.title, column.pictures[r])
        for r, label in enumerate(labels)
        for column in columns
    ]
    heads = [(f"frame {frame}", "") for frame in chosen]
    tiles = [[_tile(film[frame], top) for frame in chosen] for _, film in named]
    return _sheet(heads, [label for label, _ in named], tiles, footer, top)


def _top(columns: Sequence[Column]) -> float | None:
    """Where the scale of differences ends, above all but a hundredth of them; None without differences."""
    parts = [p.ravel() for column in columns for p in column.pictures if p.ndim == 3]
    return max(float(np.quantile(np.concatenate(parts), 0.99)), 1 / 255) if parts else None


def _tile(pixels: Array, top: float | None) -> Image.Image:
    if pixels.ndim == 2:
        pixels = _colours(np.clip(pixels / (top or 1.0), 0, 1))
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
    short, long = min(image.size), max(image.size)
    if short < _SMALL:
        times = -(-_SMALL // short)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if long > _LARGE:
        size = (round(image.width * _LARGE / long), round(image.height * _LARGE / long))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def _colours(x: Array) -> Array:
    return Scale(0, 1).rgba(x)[..., :3] / 255


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    weight = "bold" if bold else "normal"
    name = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(name, size)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Text in lines that are at most ``width`` pixels wide; a spec may break behind a comma or a colon."""
    letters = max(8, int(width / font.getlength("n")))
    lines: list[str] = []
    for line in text.split("\n"):
        loose = line.replace(",", ",\u200b ").replace(":", ":\u200b ")
        lines += [part.replace("\u200b ", "").replace("\u200b", "") for part in textwrap.wrap(loose, letters)] or [""]
    return "\n".join(lines)


def _sheet(
    heads: Sequence[tuple[str, str]], labels: Sequence[str], tiles: Sequence[Sequence[Image.Image]], footer: str,
    top: float | None,
) -> Image.Image:  # fmt: skip
    """Tiles with titles above, labels to their left, and below them what the colours mean and how they were made."""
    wide, high = (max(tile.size[axis] for row in tiles for tile in row) for axis in (0, 1))
    bold, plain, small = _font(13, bold=True), _font(12), _font(11)
    left = _LABEL if any(labels) else 2 * _GAP
    titles = [_wrapped(title, wide, bold) for title, _ in heads]
    notes = [_wrapped(note, wide, small) for _, note in heads]
    title = max(text.count("\n") + 1 for text in titles) * 17
    above = _GAP + title + max(text.count("\n") + 1 if text else 0 for text in notes) * 15 + _GAP // 2
    width = left + len(heads) * (wide + _GAP) + _GAP
    said = _wrapped(footer, width - 2 * _GAP - (370 if top is not None else 0), small)
    below = max(50 if top is not None else 0, (said.count("\n") + 1) * 15 + 2 * _GAP)
    page = Image.new("RGB", (width, above + len(tiles) * (high + _GAP) + below), _PAPER)
    draw = ImageDraw.Draw(page)
    for c, (text, note) in enumerate(zip(titles, notes, strict=True)):
        x = left + c * (wide + _GAP)
        start = _GAP + title - (text.count("\n") + 1) * 17
        draw.multiline_text((x, start), text, fill=_INK, font=bold, spacing=2)
        draw.multiline_text((x, _GAP + title), note, fill=_DIM, font=small, spacing=2)
    for r, row in enumerate(tiles):
        y = above + r * (high + _GAP)
        label = _wrapped(labels[r], left - 3 * _GAP, plain)
        draw.multiline_text((2 * _GAP, y + high // 2), label, fill=_INK, font=plain, spacing=2, anchor="lm")
        for c, tile in enumerate(row):
            page.paste(tile, (left + c * (wide + _GAP), y))
    bottom = above + len(tiles) * (high + _GAP) + _GAP
    draw.multiline_text((2 * _GAP, bottom), said, fill=_DIM, font=small, spacing=2)
    if top is not None:
        _scale(page, draw, width - 350, bottom, top)
    return page


def _scale(page: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, top: float) -> None:
    """The colours of a difference, from 0 to ``top`` and above."""
    bar = np.repeat(_colours(np.linspace(0, 1, 140))[None], 12, 0)
    font = _font(11)
    draw.text((x, y), "|difference|  0", fill=_DIM, font=font)
    start = x + int(font.getlength("|difference|  0")) + 6
    page.paste(Image.fromarray((bar * 255).astype(np.uint8)), (start, y + 1))
    draw.text((start + 146, y), f"{top:.2g} and more", fill=_DIM, font=font)
