# SPDX-License-Identifier: Apache-2.0
"""Pictures say their numbers: read back out of the SVG."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from manyheads.experiment.estimates import Estimate
from manyheads.report.colours import LEVELS, colours, scale_of
from manyheads.report.plots import Bars, Heat, Panel, Series, bars, heat, lines, of_estimates


def found_at(value, low, high):
    return Estimate(value, low, high, 3, 3, "")


def images(svg):
    found = re.findall(r'<image href="data:image/png;base64,([^"]+)"', svg)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGBA")) for one in found]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_heat_map_has_the_colours_of_its_values(sign):
    values = np.array([[0.0, 0.5, 1.0], [np.nan, 0.25, 2.0 * sign]])
    scale = scale_of(values)
    shown, bar = images(heat([Heat(values)], ["0", "1"], list("abc"), scale=scale, alt="n", axes=("r", "c"), tag="t"))
    assert np.array_equal(shown[..., 3] > 0, np.isfinite(values)) and bar.shape[:2] == (1, LEVELS)
    known = np.isfinite(values)
    assert np.array_equal(shown[known], scale.rgba(values)[known])
    assert not np.array_equal(shown[known], scale.rgba(values[:, ::-1])[known[:, ::-1]])
    assert [tuple(x) for x in bar[0, :, :3]] == list(colours(sign < 0)) and scale.signed == (sign < 0)


def test_cells_have_a_frame():
    """Of the cell that is named, at its corners; the others stand where they stood."""
    more = {"rows": ["0", "1"], "columns": list("abc"), "alt": "n", "axes": ("r", "c"), "cell": (20.0, 20.0)}
    values = np.array([[0.0, 0.5, 1.0], [0.1, 0.25, 2.0]])
    scale = scale_of(values)
    plain, framed = (heat([Heat(values, outlined=cells)], scale=scale, **more) for cells in ([], [(1, 2)]))
    assert "#d1242f" not in plain and framed.count("stroke: #d1242f") == 1
    assert [x.tolist() for x in images(plain)] == [x.tolist() for x in images(framed)]
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #d1242f', framed)
    points = np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)])
    wide = np.ptp(points, axis=0)
    assert wide == pytest.approx([15, 15], abs=0.5)  # 20 CSS pixels are 15 points
    left, top = points.min(0)
    assert left == pytest.approx((46 + 2 * 20) * 0.75, abs=0.5) and top == pytest.approx((6 + 20) * 0.75, abs=0.5)


def test_maps_stand_beside_and_below_each_other():
    maps = [Heat(np.eye(2) * i, f"map {i}", [["1/2", ""], ["", "2/2"]]) for i in range(1, 9)]
    made = heat(maps, ["0", "1"], ["a", "b"], scale=scale_of(np.eye(2) * 8), alt="n", axes=("r", "c"))
    assert len(images(made)) == 9 and made.count(">1/2<") == made.count(">2/2<") == 8
    wide, high = (float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', made).groups())
    assert wide * 96 / 72 <= 1000 and high * 96 / 72 > 240  # two rows
    assert ET.fromstring(made).tag == "svg"


def test_lines_have_their_points_and_intervals():
    found = [found_at(1, 0.5, 2), found_at(2, -np.inf, np.inf), found_at(4, 3, 5)]
    made = lines([Panel([of_estimates("a", [1, 2, 4], found)], "t", "x", "y", "x")], "n")
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2; stroke-width: 1.6', made)
    points = np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)])
    up, along = -np.diff(points[:, 1]), np.diff(points[:, 0])
    assert (
        len(points) == 3 and up[1] / up[0] == pytest.approx(2, abs=0.02) and along[0] == pytest.approx(along[1], 0.01)
    )
    assert lines([Panel([Series("a", [1], [np.nan])])], "n") == "" and ET.fromstring(made).tag == "svg"


def test_bars_are_as_long_as_their_values():
    found = [found_at(1, 1, 1), found_at(3, 2, 4), None]
    made = bars(["<a>", "b", "c"], [Bars("t", found, ["1", "3", ""], 1.0)], "n", [0, 1, 2])
    paths = re.findall(r'<path d="([^"]*)"[^>]*fill: #(?:0072b2|d55e00)', made)
    wide = [max(x) - min(x) for x in ([float(v) for v in re.findall(r"[ML] ([\d.]+) ", path)] for path in paths)]
    assert len(wide) == 2 and wide[1] / wide[0] == pytest.approx(3, abs=0.02) and "&lt;a&gt;" in made


def test_legends_and_titles_have_room():
    """Many long labels stand in as many rows as they need, and none leaves the picture; titles break their lines."""
    labels = [f"graphkv:base=snapkv(window_size={i})" for i in range(8)]
    short, long = (
        lines([Panel([Series(label, [1.0, 2.0], [1.0, 2.0]) for label in names])], "alt")
        for names in ([f"key {i}" for i in range(8)], labels)
    )
    assert _keys(short) == 5 and _keys(long) == 1  # in the first row
    assert _height(long) > _height(short)
    only = [Series("one", [1.0], [1.0])]
    assert ">one<" not in lines([Panel(only)], "alt") and ">one<" in lines(
        [Panel(only, level=(0, 0, 0, "full"))], "alt"
    )
    estimate = Estimate(1.0, 0.5, 1.5, 4, 4, "t")
    title = "loss in the last tenth of training, nats/token"
    picture = bars(["a"], [Bars(title, [estimate], [""]), Bars("b", [estimate], [""])], "alt", [0])
    assert f">{title}<" not in picture and ">training, nats/token<" in picture


def _keys(picture):
    """Labels in the fullest row of the legend."""
    label = r'<text style="[^"]*text-anchor: start[^"]*" x="[\d.]+" y="([\d.]+)">(?:graphkv[^<]*|key \d)<'
    heights = re.findall(label, picture)
    return max(heights.count(y) for y in heights)


def _height(picture):
    return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', picture)[1])


def test_labels_of_rows_have_room():
    """A label ends beside its row and begins within the picture, as wide as its letters are; an endless one is cut."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", size=8)
    for label in ("0", "sitting down, slowly", "a label of so many letters that it leaves no room for its map"):
        made = heat([Heat(np.eye(2))], [label, "b"], ["c", "d"], scale=scale_of(np.eye(2)), alt="n", axes=("r", "c"))
        (said, *_) = [one for one in re.findall(r"<text[^>]*>[^<]*</text>", made) if f">{label[:30]}" in one]
        end = float(re.search(r'x="([\d.]+)"', said)[1])
        text = re.search(r">([^<]*)<", said)[1]
        assert "text-anchor: end" in said and end - TextPath((0, 0), text, prop=font).get_extents().width >= 0
        assert end < 0.75 * 260 and (text == label or text.endswith("…"))


def test_captions_say_what_is_drawn():
    from manyheads.report.compare_plots import _read
    from report.test_compare import made as summary_of

    summary = summary_of({"full": [1.0] * 4, "a": [1.0] * 4})
    said = _read(summary, [one for one in summary.measured if not one.cost])
    assert "×" not in said and "Times" not in said and "Thin lines are 95 % intervals." in said
