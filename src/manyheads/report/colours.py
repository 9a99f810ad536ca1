# SPDX-License-Identifier: Apache-2.0
"""Colours of pictures: one map for values, one for signed values, the palette of lines; and small PNGs.

All are told apart with any kind of colour vision.
"""

import base64
import io
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

__all__ = ["LEVELS", "PALETTE", "Scale", "colours", "data_uri", "halved", "pixels", "plain", "ramp", "scale_of"]

LEVELS = 64  # colours of a picture; one more is clear
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")  # Okabe and Ito's
Array = np.ndarray[Any, np.dtype[Any]]


@cache
def colours(signed: bool = False) -> tuple[tuple[int, int, int], ...]:
    """The LEVELS colours of a scale."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    if signed:
        made: Any = LinearSegmentedColormap.from_list(
            "signed", ["#08306b", "#0072b2", "#9ecae9", "#f3f1ec", "#f5b377", "#d55e00", "#6b2500"]
        )
    else:
        made = colormaps["cividis"]
    rows = (made(np.linspace(0, 1, LEVELS))[:, :3] * 255).round().astype(int).tolist()
    return tuple((r, g, b) for r, g, b in rows)


@dataclass(frozen=True)
class Scale:
    """How values become colours.

    Attributes:
        low, high: ends of the colours.
        signed: about 0, in two colours.
        log: logarithmic; then ``low`` is above 0.
    """

    low: float
    high: float
    signed: bool = False
    log: bool = False

    def levels(self, values: Array) -> Array:
        """0 to LEVELS - 1, LEVELS where there is no value."""
        x = np.asarray(values, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.log:
                part = np.log(np.maximum(x, self.low) / self.low) / math.log(self.high / self.low)
            else:
                part = (x - self.low) / (self.high - self.low)
        levels = np.clip(np.nan_to_num(part * LEVELS, nan=0, posinf=LEVELS, neginf=0), 0, LEVELS - 1).astype(np.uint8)
        return np.where(np.isnan(x), LEVELS, levels).astype(np.uint8)

    def rgba(self, values: Array) -> Array:
        """Colours ``[..., 4]`` of ``values``, clear where there is no value."""
        table = np.array([(*colour, 255) for colour in colours(self.signed)] + [(128, 128, 128, 0)], np.uint8)
        return np.asarray(table[self.levels(values)])

    def ticks(self) -> tuple[float, float, float]:
        """The values of both ends and of the middle."""
        if self.signed:
            return self.low, 0.0, self.high
        return self.low, math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2, self.high


def scale_of(values: Array, log: bool = False) -> Scale | None:
    """The scale that fits ``values``; None where they cannot be shown (or not on a logarithmic scale)."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not known.size:
        return None
    low, high = float(known.min()), float(known.max())
    if log:
        positive = known[known > 0]
        if low < 0 or not positive.size or high / float(positive.min()) < 3:
            return None
        return Scale(max(float(positive.min()), high * 1e-4), high, log=True)
    if low < 0 < high or high <= 0 > low:
        largest = max(-low, high)
        return Scale(-largest, largest, signed=True)
    if high == low:
        return Scale(min(0.0, low), high if high > 0 else 1.0)
    return Scale(min(0.0, low) if low < 0.5 * high else low, high)


def pixels(levels: Array) -> bytes:
    """A PNG with a palette, of ``levels [h, w]``, 0 to LEVELS - 1 and LEVELS for clear."""
    from PIL import Image

    file, image = io.BytesIO(), Image.fromarray(levels.astype(np.uint8))
    image.putpalette([part for colour in (*colours(), (128, 128, 128)) for part in colour])
    image.save(file, "PNG", optimize=True, transparency=b"\xff" * LEVELS + b"\x00")
    return file.getvalue()


def data_uri(picture: bytes, kind: str = "png") -> str:
    """A PNG or JPEG as the source of an image."""
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def ramp() -> str:
    """The colours in a row, as the source of an image."""
    return data_uri(pixels(np.arange(LEVELS, dtype=np.uint8)[None]))


def halved(x: Array) -> Array:
    """Means of 2 x 2 cells of the last two axes; an odd last row or column stands for itself."""
    *rest, high, wide = x.shape
    x = np.pad(x, [*[(0, 0)] * len(rest), (0, high % 2), (0, wide % 2)], mode="edge")
    return np.asarray(x.reshape(*rest, -(-high // 2), 2, -(-wide // 2), 2).mean((-3, -1)))


def plain(values: Any) -> list[Any]:
    """Numbers of four digits, null where there is none."""
    return [[float(f"{v:.4g}") if math.isfinite(v) else None for v in row] for row in np.asarray(values, float)]
