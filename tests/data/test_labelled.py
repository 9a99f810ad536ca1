# SPDX-License-Identifier: Apache-2.0
"""Labelled sequences: what is said of a data set is so, and no group stands in two parts."""

from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
import torch

from manyheads.data import files
from manyheads.data.labelled import DATASETS, labelled
from manyheads.errors import UserError

FILES = {
    "brown": ("brown",), "fsdd": ("fsdd", "free-spoken-digit-dataset"), "osuleaf": ("aeon",), "acsf1": ("aeon",),
}  # fmt: skip


@cache
def whole(name):
    return labelled(name)


def read(name):
    if name in FILES and not any(files.local(file) for file in FILES[name]):
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    return whole(name)


@pytest.mark.parametrize("name", DATASETS)
def test_is_what_is_said_of_it(name):
    found, facts = read(name), DATASETS[name]
    test = Counter(item.label for item in found.part("test"))
    assert len(found.classes) == facts.classes == len(test)
    assert max(test.values()) / test.total() == pytest.approx(facts.floor)
    for part in ("train", "validation", "test"):
        assert {item.label for item in found.part(part)} == set(range(facts.classes))
    assert len({item.name for item in found.items}) == len(found.items)
    for item in found.items[:50]:
        assert item.values.dtype == (torch.uint8 if facts.kind == "bytes" else torch.float32)
        if facts.kind != "bytes":
            assert item.values.shape[1:] == (1,) and abs(float(item.values.mean())) < 1e-4
            assert float(item.values.std()) == pytest.approx(1.0, abs=1e-3)


def in_two_parts(items):
    parts = {}
    for item in items:
        parts.setdefault(item.group, set()).add(item.part)
    return [group for group, found in parts.items() if len(found) > 1]


@pytest.mark.parametrize("name", DATASETS)
def test_no_group_stands_in_two_parts(name):
    found = read(name)
    assert not in_two_parts(found.items)
    if name in ("fsdd", "tones"):  # control: by class, every group would
        assert {item.group for item in found.part("test")} != {item.group for item in found.items}
        assert len({item.group for item in found.part("test")}) < 3


def test_speakers_are_held_out():
    found = read("fsdd")
    speakers = {part: {item.group for item in found.part(part)} for part in ("train", "validation", "test")}
    assert speakers["test"] == {"george"} and len(speakers["train"]) == 4 and len(speakers["validation"]) == 1
    assert len(found.items) == 3000 and all(item.name.startswith(str(item.label)) for item in found.items)


def test_the_order_mixes_classes():
    labels = [item.label for item in labelled("tones").part("train")]
    runs = sum(a != b for a, b in pairwise(labels))
    assert runs > len(labels) / 3


def test_an_unknown_name():
    with pytest.raises(UserError, match="there are brown, fsdd"):
        labelled("imdb")
