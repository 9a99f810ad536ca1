# SPDX-License-Identifier: Apache-2.0
"""Public files that claims and tests read: from a folder of yours, from the cache, or from their public source.

``files.toml`` beside this file says of each where it comes from, its licence and its checksum. A file is looked for

1. in the folder that the environment variable ``MANYHEADS_DATA`` names, if it is set,
2. in the cache, ``~/.cache/manyheads/data``,
3. at its public source; what is downloaded is kept in the cache.

What does not have the checksum is never read. :func:`local` does not download, so that what can do without a file asks
for it there, and a test that cannot is skipped.
"""

import hashlib
import http.client
import os
import tempfile
import tomllib
import urllib.request
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import UserError

__all__ = ["DataFile", "entry", "folder", "local", "names", "path", "text"]

_TIMEOUT = 30.0  # seconds without an answer of the source


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A public file.

    Attributes:
        name: by which it is asked for.
        path: where it stands in a data folder.
        url: its public source; empty for a packing of files that are published in another form only.
        sha256: checksum of the whole file, empty where ``trees`` has to do.
        trees: of a zip archive of a git repository, whose own bytes may change: the tree ids of the folders in it.
        bytes: its size, of an archive the most that it may have.
        licence: as the source states it.
        origin: who made it, and where it was published.
    """

    name: str
    path: str
    url: str
    sha256: str = ""
    trees: dict[str, str] = field(default_factory=dict)
    bytes: int
    licence: str
    origin: str

    def sound(self, file: Path) -> bool:
        """Whether ``file`` holds what is meant."""
        if not self.trees:
            return _sha256(file) == self.sha256
        try:
            with zipfile.ZipFile(file) as archive:
                root = archive.namelist()[0].partition("/")[0]
                return all(_tree(archive, f"{root}/{folder}/") == tree for folder, tree in self.trees.items())
        except (zipfile.BadZipFile, IndexError, OSError):
            return False


@cache
def _entries() -> dict[str, DataFile]:
    table = tomllib.loads((Path(__file__).parent / "files.toml").read_text(encoding="utf-8"))
    return {name: DataFile(name=name, **row) for name, row in table.items()}


def names() -> list[str]:
    """Return the names of all files there are entries for, sorted."""
    return sorted(_entries())


def entry(name: str) -> DataFile:
    """Return what is known of the file called ``name``.

    Raises:
        UserError: there is no such entry.
    """
    if name not in _entries():
        raise UserError(f"there is no data file {name!r}; there are {', '.join(names())}")
    return _entries()[name]


def local(name: str) -> Path | None:
    """Return where the file called ``name`` lies on this machine, None where it does not; nothing is downloaded.

    Raises:
        UserError: there is no such entry, ``MANYHEADS_DATA`` names no folder, or the file there is another one.
    """
    wanted, folder = entry(name), _folder()
    if folder is not None and (mine := folder / wanted.path).is_file():
        if not wanted.sound(mine):
            source = wanted.url or wanted.origin
            raise UserError(f"{mine} is not what it should be ({source}): its checksum differs; take it away")
        return mine
    kept = _cache() / wanted.path
    return kept if kept.is_file() and wanted.sound(kept) else None


def path(name: str) -> Path:
    """Return where the file called ``name`` lies, after a download where it is not on this machine yet.

    Raises:
        UserError: it cannot be had; the message says where to put it by hand. Or as for :func:`local`.
    """
    return local(name) or _download(entry(name))


def text(name: str) -> str:
    """Return the content of the UTF-8 file called ``name``; raises as :func:`path` does."""
    return path(name).read_text(encoding="utf-8")


def folder(inside: str) -> Path | None:
    """A folder of files that are in no list, in the folder that ``MANYHEADS_DATA`` names; None where there is none."""
    root = _folder()
    found = root / inside if root else None
    return found if found is not None and found.is_dir() else None


def _folder() -> Path | None:
    given = os.environ.get("MANYHEADS_DATA")
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UserError(f"MANYHEADS_DATA names {given}, which is no folder; name one, or unset it")
    return folder


def _cache() -> Path:
    return Path.home() / ".cache" / "manyheads" / "data"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tree(archive: zipfile.ZipFile, folder: str) -> str:
    """The id that git gives a folder of plain files, of what an archive holds of it."""
    entries = b""
    for name in sorted(n for n in archive.namelist() if n.startswith(folder) and not n.endswith("/")):
        content = archive.read(name)
        mode = b"100755 " if archive.getinfo(name).external_attr >> 16 & 0o100 else b"100644 "
        entries += mode + name.removeprefix(folder).encode() + b"\0" + _git(b"blob", content)
    return _git(b"tree", entries).hex()


def _git(kind: bytes, content: bytes) -> bytes:
    header = kind + b" " + str(len(content)).encode() + b"\0"
    return hashlib.sha1(header + content, usedforsecurity=False).digest()


def _download(wanted: DataFile) -> Path:
    """Fetch a file into the cache; a reader never meets half of one."""
    target = _cache() / wanted.path
    by_hand = f"put it at {target}, or name a folder that holds {wanted.path} by MANYHEADS_DATA"
    if not wanted.url:
        raise UserError(f"{wanted.name} ({wanted.origin}) is not published in this form; {by_hand}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(wanted.url, timeout=_TIMEOUT) as answer:
            data = answer.read(wanted.bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{wanted.name} cannot be had from {wanted.url} ({error}); {by_hand}") from error
    handle, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        if not wanted.sound(Path(draft)):
            raise UserError(f"{wanted.url} no longer holds the file that is meant: its checksum differs; {by_hand}")
        Path(draft).replace(target)
    finally:
        Path(draft).unlink(missing_ok=True)
    return target
