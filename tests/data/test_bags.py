# SPDX-License-Identifier: Apache-2.0
"""Bags: what is said of a set is so, bags of digits share no image between folds, files of one's own are read."""

from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from manyheads.data import files
from manyheads.data.bags import CLASSES, FOLDS, bags, digit_bags, read_bag, read_folder
from manyheads.errors import UserError

FACTS = {  # bags, positive ones, fewest and most instances, all of them, features
    "ucsb": (58, 26, 21, 40, 2002, 708), "musk1": (92, 47, 2, 40, 476, 166), "musk2": (102, 39, 1, 1044, 6598, 166),
    "elephant": (200, 100, 2, 13, 1391, 230),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_is_what_is_said_of_it(name):
    if files.local("mil") is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    found, (count, positive, fewest, most, instances, features) = bags(name), FACTS[name]
    sizes = [len(bag.values) for bag in found]
    assert len(found) == len({bag.name for bag in found}) == len({bag.patient for bag in found}) == count
    assert Counter(bag.label for bag in found)[CLASSES[name][1]] == positive
    assert (min(sizes), max(sizes), sum(sizes)) == (fewest, most, instances)
    assert {bag.values.shape[1] for bag in found} == {features}
    assert all(bag.values.dtype == np.float32 and np.isfinite(bag.values).all() for bag in found)


def nearest(values):
    """The image that an instance is of, found by what is nearest: noise has a deviation of 0.1 a pixel."""
    images = load_digits().data / 16
    far = (values**2).sum(1)[:, None] - 2 * values @ images.T + (images**2).sum(1)
    return far.argmin(1)


def test_bags_of_digits_hold_what_is_said_and_share_no_image():
    found, digits = digit_bags(), load_digits().target
    assert len(found) == FOLDS * 36 and {bag.values.shape for bag in found} == {(60, 64)}
    of_fold = {}
    for bag in [bag for bag in found if bag.fold in (0, 7)]:
        at = nearest(bag.values.astype(np.float64))
        held = Counter(digits[at].tolist())
        easy, hard = {"easy": (3, 2), "hard": (0, 2), "none": (0, 0)}[bag.kind]
        assert (held[0], held[5]) == (easy, hard) and bag.label == ("without" if bag.kind == "none" else "with")
        of_fold.setdefault(bag.fold, set()).update(at.tolist())
    assert not of_fold[0] & of_fold[7] and min(map(len, of_fold.values())) > 150
    one, two = ({*nearest(bag.values.astype(np.float64)).tolist()} for bag in found[:2])
    assert one & two  # control: within a fold images are shared
    trained = [bag for bag in found if not bag.extra]
    assert Counter(bag.kind for bag in trained) == {"none": 100, "easy": 90, "hard": 10}
    assert {bag.kind for bag in found if bag.extra} == {"hard"}
    places = [np.flatnonzero(digits[nearest(b.values.astype(np.float64))] == 5) for b in found[10:20]]
    assert len({tuple(place.tolist()) for place in places}) > 5  # instances stand anywhere in a bag


def test_a_set_that_is_not_there():
    with pytest.raises(UserError, match="ucsb, musk1"):
        bags("fox")


def test_a_bag_of_ones_own(tmp_path):
    values = np.arange(6, dtype=np.float64).reshape(3, 2)
    save_file({"features": values}, tmp_path / "a.safetensors")
    (tmp_path / "b.csv").write_text("0,1\n2,3\n4,5\n")
    (tmp_path / "c.csv").write_text("width,height\n0,1\n2,3\n4,5\n")
    for name in ("a.safetensors", "b.csv", "c.csv"):
        found = read_bag(tmp_path / name)
        assert found.dtype == np.float32 and (found == values).all()


@pytest.mark.parametrize("text", ["", "a,b\n", "1,2\n3\n", "1,nan\n", "1,2\nx,3\n"])
def test_what_is_no_bag_is_refused(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match="no bag"):
        read_bag(tmp_path / "x.csv")


def test_a_file_of_two_tensors_or_none_is_no_bag(tmp_path):
    save_file({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"no tensors")
    for name in ("x", "y", "z"):
        with pytest.raises(UserError, match="no bag"):
            read_bag(tmp_path / f"{name}.safetensors")


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "bags.csv").write_text("bag,patient,label\none,ann,0\ntwo,ann,1\n")
    (tmp_path / "one.csv").write_text("1,2\n3,4\n")
    with pytest.raises(UserError, match=r"no two\.safetensors"):
        read_folder(tmp_path)
    save_file({"features": np.ones((4, 2))}, tmp_path / "two.safetensors")
    one, two = read_folder(tmp_path)
    assert (one.patient, one.label, one.values.shape) == ("ann", "0", (2, 2)) and two.values.shape == (4, 2)
    save_file({"features": np.ones((4, 3))}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="another number of features"):
        read_folder(tmp_path)
    (tmp_path / "bags.csv").write_text("bag,patient,label\none,ann,0\none,bob,1\n")
    with pytest.raises(UserError, match="twice"):
        read_folder(tmp_path)
    for text in ("bag,label\none,0\n", "bag,patient,label\n"):
        (tmp_path / "bags.csv").write_text(text)
        with pytest.raises(UserError, match=r"bags\.csv"):
            read_folder(tmp_path)
    (tmp_path / "bags.csv").unlink()
    with pytest.raises(UserError, match=r"bags\.csv"):
        read_folder(tmp_path)
