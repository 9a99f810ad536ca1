# SPDX-License-Identifier: Apache-2.0
"""Public files: folder, cache, source, in this order, and never one with another checksum."""

import hashlib
import io
import urllib.error
import urllib.request

import pytest

from manyheads.data import files
from manyheads.errors import UserError

CONTENT = b"ROMEO: Is the day so young?\n"
NAME = "play"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A home, a data folder, and a source that says what it was asked."""
    asked = []
    row = files.DataFile(
        name=NAME, path="text/play.txt", url="https://example.org/play.txt", bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(), licence="public domain", origin="a test",
    )  # fmt: skip
    source = {"data": CONTENT}

    def urlopen(url, timeout):
        asked.append(url)
        if source["data"] is None:
            raise urllib.error.URLError("no network")
        return io.BytesIO(source["data"])

    monkeypatch.setattr(files, "_entries", lambda: {NAME: row})
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(files.Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv("MANYHEADS_DATA", raising=False)
    (tmp_path / "mine" / "text").mkdir(parents=True)
    return tmp_path, source, asked, monkeypatch


def test_downloaded_once_and_kept(world):
    folder, _, asked, _ = world
    assert files.local(NAME) is None and not asked
    first = files.path(NAME)
    assert first.is_relative_to(folder / "home") and first.read_bytes() == CONTENT
    assert files.path(NAME) == first and files.text(NAME) == CONTENT.decode() and len(asked) == 1
    assert [p.name for p in first.parent.iterdir()] == ["play.txt"]  # no draft is left
    first.write_bytes(b"damaged")
    assert files.local(NAME) is None
    assert files.path(NAME).read_bytes() == CONTENT and len(asked) == 2


def test_the_folder_named_goes_first(world):
    folder, _, asked, patch = world
    mine = folder / "mine" / "text" / "play.txt"
    mine.write_bytes(CONTENT)
    patch.setenv("MANYHEADS_DATA", str(folder / "mine"))
    assert files.path(NAME) == files.local(NAME) == mine and not asked
    mine.write_bytes(b"another play")
    with pytest.raises(UserError, match="checksum differs"):
        files.path(NAME)
    mine.unlink()  # a folder that lacks it is no hindrance
    assert files.path(NAME).read_bytes() == CONTENT and len(asked) == 1
    patch.setenv("MANYHEADS_DATA", str(folder / "nowhere"))
    with pytest.raises(UserError, match="no folder"):
        files.path(NAME)


@pytest.mark.parametrize(
    ("data", "says"), [(None, "no network"), (b"moved", "no longer holds"), (CONTENT * 2, "no lon")]
)
def test_what_cannot_be_had(world, data, says):
    _, source, _, _ = world
    source["data"] = data
    with pytest.raises(UserError, match=says) as raised:
        files.path(NAME)
    assert "MANYHEADS_DATA" in str(raised.value) and "\n" not in str(raised.value)
    assert files.local(NAME) is None


def test_entries():
    assert "tinyshakespeare" in files.names()
    for name in files.names():
        row = files.entry(name)
        assert len(row.sha256) == 64 or (row.trees and all(len(tree) == 40 for tree in row.trees.values()))
        assert row.url or row.sha256
        assert row.bytes > 0 and row.url.startswith("https://" if row.url else "") and row.licence and row.origin
        assert not row.path.startswith("/") and ".." not in row.path
    assert len({files.entry(name).path for name in files.names()}) == len(files.names())
    with pytest.raises(UserError, match=r"there are .*tinyshakespeare"):
        files.entry("hamlet")


@pytest.mark.parametrize("name", files.names())
def test_files_on_this_machine_are_those_of_the_entries(name):
    where = files.local(name)
    if where is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    held, stated = where.stat().st_size, files.entry(name)
    assert held <= stated.bytes if stated.trees else held == stated.bytes  # an archive's own bytes may change
