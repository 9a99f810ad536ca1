# SPDX-License-Identifier: Apache-2.0
"""Scenes and films: what they say of themselves is what is in them."""

import hashlib
import io
import zipfile

import pytest
import torch

from manyheads.data import files
from manyheads.data import scenes as data
from manyheads.errors import UserError

needs_data = pytest.mark.skipif(not data.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@needs_data
@pytest.mark.parametrize("kind", ["scenes", "moving"])
def test_shapes_and_seeds(kind):
    sample = data.draw(kind, 5, seeded())
    again, other = data.draw(kind, 5, seeded()), data.draw(kind, 5, seeded(1))
    assert sample.images.shape == ((5, 3, 32, 32) if kind == "scenes" else (5, 3, 8, 16, 16))
    assert sample.alpha.shape == (5, 1, *sample.images.shape[2:]) and sample.labels.shape == (5, 3)
    assert sample.images.min() >= -1 and sample.images.max() <= 1 and 0 <= sample.alpha.min() <= sample.alpha.max() <= 1
    assert torch.equal(sample.images, again.images) and not torch.equal(sample.images, other.images)


@needs_data
def test_the_object_is_in_its_quarter():
    for place in range(4):
        alpha = data.draw("scenes", 20, seeded(), place=place).alpha
        quarters = torch.stack([q for half in alpha.chunk(2, 2) for q in half.chunk(2, 3)]).sum((1, 2, 3, 4))
        assert quarters[place] > 0 and quarters.sum() == quarters[place]


@needs_data
@pytest.mark.parametrize("direction", range(4))
def test_object_and_window_move_one_pixel_a_frame(direction):
    sample = data.draw("moving", 10, seeded(), direction=direction)
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    for turned, step in enumerate(steps):
        moved = sample.alpha[:, :, :-1].roll(step, (-2, -1))
        assert torch.equal(moved, sample.alpha[:, :, 1:]) == (turned == direction)
    empty = (sample.alpha[:, :, :-1] == 0) & (sample.alpha[:, :, 1:] == 0)
    row, column = steps[direction]
    seen = sample.images[:, :, :-1].roll((-row, -column), (-2, -1))  # the window moves on, what it shows moves back
    inner = torch.zeros_like(empty)
    inner[..., 1:-1, 1:-1] = True
    clear = (inner & empty & (sample.alpha[:, :, :-1].roll((-row, -column), (-2, -1)) == 0)).expand_as(seen)
    assert clear.any() and torch.equal(seen[clear], sample.images[:, :, 1:][clear])


@needs_data
def test_outside_the_object_a_scene_is_a_photograph_of_its_backdrop():
    sample = data.draw("scenes", 8, seeded(3), backdrop=2)
    photographs = data.photographs("train")[2].float() / 255 * 2 - 1
    photographs = torch.cat([photographs, photographs.flip(-1)])
    for image, alpha in zip(sample.images, sample.alpha, strict=True):
        clear = (alpha == 0).expand_as(image)
        apart = (photographs[:, clear] - image[clear]).abs().amax(1)
        assert apart.min() < 1e-6 and (apart < 1e-6).sum() <= 2
        assert (photographs - image).abs().amax((1, 2, 3)).min() > 0.1  # the object covers some of it


@needs_data
def test_test_photographs_are_others():
    train, test = (
        {hashlib.sha1(p.numpy().tobytes()).digest() for part in data.photographs(s) for p in part}
        for s in ("train", "test")
    )
    assert not train & test


def test_captions():
    assert data.read_caption("a fire at the top left over a frog", "scenes") == [4, 9, 18]
    assert data.read_caption("Ghost moving to the left", "moving") == [5, data.WORDS.index("to the left"), 0]
    assert data.read_caption("", "scenes") == [0, 0, 0]
    for i, words in enumerate(zip(*data.VOCABULARY["scenes"].values(), strict=False)):
        labels = torch.full((1, 3), i)
        assert data.tokens(labels, "scenes")[0].tolist() == data.read_caption(", ".join(words), "scenes")
    for bad, says in (("dragon top left", "'dragon' is not known"), ("fire and ghost", "say one object")):
        with pytest.raises(UserError, match=says) as raised:
            data.read_caption(bad, "scenes")
        assert "\n" not in str(raised.value)


def test_trees_are_those_of_git(tmp_path):
    """The ids that git itself gives, of a folder of two files (`git rev-parse HEAD:folder`)."""
    archive = tmp_path / "a.zip"

    def write(content: bytes) -> None:
        with zipfile.ZipFile(archive, "w") as made:
            made.writestr("repo-1/", b"")
            made.writestr("repo-1/folder/b.txt", b"two\n")
            made.writestr("repo-1/folder/a.txt", content)

    tree = "6640fb01ffae1cdd778a3fe65b469f62a5230def"
    row = files.DataFile(
        name="n", path="a.zip", url="https://example.org", trees={"folder": tree}, bytes=1, licence="", origin=""
    )
    write(b"one\n")
    assert row.sound(archive)
    write(b"One\n")
    assert not row.sound(archive)
    with zipfile.ZipFile(archive, "w") as made:  # a mode is part of a tree, as `git update-index --chmod=+x` shows
        for name, content, mode in (("a.txt", b"one\n", 0o755), ("b.txt", b"two\n", 0o644)):
            member = zipfile.ZipInfo(f"repo-1/folder/{name}")
            member.external_attr = (0o100000 | mode) << 16
            made.writestr(member, content)
    assert not row.sound(archive)
    row.trees["folder"] = "a244162bc4add1bbf608d0fc5020d4568f0201b9"
    assert row.sound(archive)
    archive.write_bytes(io.BytesIO(b"no archive").getvalue())
    assert not row.sound(archive)
