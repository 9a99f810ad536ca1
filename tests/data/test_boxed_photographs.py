# SPDX-License-Identifier: Apache-2.0
"""Photographs with boxes: what is said of blood cells is so, planted shapes fill their boxes, folders are read."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from manyheads.data import files
from manyheads.data.boxed_photographs import CLASSES, blood_cells, planted, read_folder, read_image
from manyheads.errors import UserError

XML = """<annotation><size><width>640</width></size>{}</annotation>"""
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.mark.slow
def test_blood_cells_are_what_is_said_of_them():
    if files.local("bccd") is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    parts, labels, names = Counter(), Counter(), []
    for one in blood_cells():
        parts[one.part] += 1
        labels.update(one.labels)
        names.append(one.name)
        assert one.image.shape == (480, 640, 3) and len(one.boxes) == len(one.labels) > 0
        assert (one.boxes >= 0).all() and (one.boxes[:, 2:] <= [640, 480]).all()
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
    assert parts == {"train": 205, "validation": 87, "test": 72} and len(set(names)) == 364
    assert labels == {"RBC": 4153, "WBC": 372, "Platelets": 361} and set(labels) == set(CLASSES["bccd"])


def test_planted_shapes_fill_their_boxes_and_lie_apart():
    found = list(planted())
    assert Counter(one.part for one in found) == {"train": 120, "validation": 40, "test": 40}
    labels = Counter(name for one in found for name in one.labels)
    assert set(labels) == set(CLASSES["planted"]) and 0.6 < labels["disc"] / labels.total() < 0.8
    assert [one.image.tobytes() for one in planted()] == [one.image.tobytes() for one in found]
    for one in found[:40]:
        ground = np.median(one.image.reshape(-1, 3), 0)
        strange = (np.abs(one.image.astype(float) - ground) > 75).mean(-1) > 0
        inside = np.zeros(strange.shape, int)
        for left, upper, right, lower in one.boxes.astype(int):
            inside[upper:lower, left:right] += 1
        assert inside.max() == 1 and not (strange & (inside == 0)).mean() > 0.01
        for box, name in zip(one.boxes.astype(int), one.labels, strict=True):
            left, upper, right, lower = box
            cut = one.image[upper:lower, left:right].astype(float)
            apart = np.abs(cut - ground).mean(-1) > 40
            if apart.mean() > 0.3:  # bright and dark ones alike may be near the ground
                wanted = {"disc": np.pi / 4, "square": 1.0, "triangle": 0.5}[name]
                assert abs(apart.mean() - wanted) < 0.2


def folder_of(place, names=("a", "b", "c"), split=None):
    for kind in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (place / kind).mkdir(parents=True)
    for i, name in enumerate(names):
        things = OBJECT.format("cat", 10, 20, 30 + i, 40) + OBJECT.format("dog", -5, 0, 900, 12)
        (place / f"Annotations/{name}.xml").write_text(XML.format(things))
        Image.new("RGB", (64, 48), (i, 0, 0)).save(place / f"JPEGImages/{name}.{'png' if i else 'jpg'}")
    for part, some in (split or {}).items():
        (place / f"ImageSets/Main/{part}.txt").write_text("\n".join(some))
    return place


def test_a_folder_of_ones_own(tmp_path):
    found = list(read_folder(folder_of(tmp_path / "plain")))
    assert [one.name for one in found] == ["a", "b", "c"] and {one.part for one in found} == {""}
    assert found[1].labels == ("cat", "dog") and found[1].image.shape == (48, 64, 3)
    assert found[1].boxes.tolist() == [[10, 20, 31, 40], [0, 0, 64, 12]]  # cut off at the edges
    parted = read_folder(folder_of(tmp_path / "parted", split={"train": ["c"], "val": ["a"], "test": ["b"]}))
    assert {one.name: one.part for one in parted} == {"c": "train", "a": "validation", "b": "test"}


def test_what_has_no_extent_is_left_out(tmp_path):
    place = folder_of(tmp_path / "x", names=("a",))
    things = OBJECT.format("cat", 5, 5, 5, 5) + OBJECT.format("cat", 90, 5, 99, 9) + OBJECT.format("cat", 1, 2, 3, 4)
    (place / "Annotations/a.xml").write_text(XML.format(things))
    (one,) = read_folder(place)
    assert one.boxes.tolist() == [[1, 2, 3, 4]]
    (place / "Annotations/a.xml").write_text(XML.format(""))
    (one,) = read_folder(place)
    assert one.boxes.shape == (0, 4) and one.labels == ()


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no Annotations/\*\.xml"):
        list(read_folder(tmp_path))
    place = folder_of(tmp_path / "x", split={"train": ["a"], "val": ["z"], "test": ["b"]})
    with pytest.raises(UserError, match="z"):
        list(read_folder(place))
    (place / "ImageSets/Main/val.txt").unlink()
    (place / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(UserError, match="annotation of b"):
        list(read_folder(place))
    (place / "Annotations/b.xml").write_text(XML.format("<object><name>x</name></object>"))
    with pytest.raises(UserError, match="annotation of b"):
        list(read_folder(place))
    (place / "JPEGImages/b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image"):
        list(read_folder(place))
    (place / "JPEGImages/b.png").unlink()
    with pytest.raises(UserError, match=r"no JPEGImages/b"):
        list(read_folder(place))
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path / "none.png")
