# SPDX-License-Identifier: Apache-2.0
"""What the pages share: templates, the one script named by its hash, data that ends no element, colours, small PNGs.

A page is one file that asks for nothing. Its texts are escaped, and its policy lets in no script but ours.
"""

import base64
import hashlib
import json
import math
import struct
import zlib
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

__all__ = ["LEVELS", "colours", "data_uri", "embedded", "filled", "markup", "number", "pixels"]

LEVELS = 64  # colours of a picture; one more is clear
Array = np.ndarray[Any, np.dtype[Any]]


def filled(template: str, package: str, *, script: str = "", data: Any = None, **given: Any) -> str:
    """A template of ``package``, or of those that all pages share, filled.

    Args:
        template: its name.
        package: dotted name; its templates lie in its folder ``templates``.
        script: name of the page's script there; it comes along where there is ``data``.
        data: for the script, of JSON's types.
        given: what the template asks for beside ``script``, ``script_hash`` and ``data``.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("manyheads")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    code = "" if data is None else (resources.files(package) / "templates" / script).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template(template).render(
        script=markup(code), script_hash=markup(f"'sha256-{digest}'") if code else "",
        data="" if data is None else embedded(data), **given,
    )  # fmt: skip


def embedded(data: Any) -> Any:
    """JSON that stands inside an element: nothing in it can end the element that holds it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return markup(text)


def markup(text: str) -> Any:
    """``text`` as HTML that is not escaped again."""
    from markupsafe import Markup

    return Markup(text)


@cache
def colours(signed: bool) -> tuple[tuple[int, int, int], ...]:
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


def pixels(levels: Array, signed: bool = False) -> bytes:
    """A PNG with a palette, of ``levels [h, w]``, 0 to LEVELS - 1 and LEVELS for clear."""
    high, wide = levels.shape
    rows = np.concatenate([np.zeros((high, 1), np.uint8), levels.astype(np.uint8)], 1)  # a filter byte, 0: none
    palette = b"".join(bytes(colour) for colour in colours(signed)) + b"\x80\x80\x80"
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", b"\xff" * LEVELS + b"\x00"),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made


def data_uri(png: bytes) -> str:
    """A PNG as the source of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def number(value: float) -> str:
    """Three digits, as a reader wants them."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
