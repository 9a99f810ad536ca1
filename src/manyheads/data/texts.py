# SPDX-License-Identifier: Apache-2.0
"""Text to compare on: texts by name, or the user's files and folders."""

import hashlib
import re
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

__all__ = ["CORPORA", "Text", "corpus", "digest", "is_code", "read", "standard_library"]

# Texts by name: `code` is the standard library's source, `essays` a folder that cannot be downloaded, the others are
# files of `data/files.toml`. `prose` is cut into long pieces, `wikitext` the same words by article.
CORPORA = {
    "code": (), "prose": ("wikitext2-test", "wikitext2-valid"), "plays": ("tinyshakespeare",), "essays": (),
    "wikitext": ("wikitext2-test", "wikitext2-valid"), "brown": ("brown",),
}  # fmt: skip
_ARTICLE = re.compile(r"(?m)^(?= = [^=\n].* = $)")  # where an article of WikiText begins
_ESSAYS = "text/essays"  # in the folder of the data
_CODE = frozenset(
    ".bash .c .cc .clj .cpp .cs .cu .css .el .ex .f90 .go .h .hpp .hs .html .java .jl .js .json .jsx .kt .lua .m .ml "
    ".php .pl .proto .ps1 .py .pyi .r .rb .rs .scala .sh .sql .swift .toml .ts .tsx .vue .xml .yaml .yml .zig".split()
)
_PIECE = 60_000  # characters of a long file that count as a text of its own

LARGEST = 4_000_000  # bytes of one file
MOST = 64_000_000  # bytes of all files

# Folders of a project that hold nothing its author wrote.
_SKIPPED_FOLDERS = {"node_modules", "site-packages", "__pycache__", "venv", "env", "build", "dist"}
# Parts of the standard library that are tests, tables or another Python's grammar rather than ordinary code.
_NOT_PROSE = {"test", "tests", "idle_test", "idlelib", "turtledemo", "encodings", "pydoc_data", "lib2to3", "distutils"}


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text and where it came from; ``name`` is a path relative to what was asked for."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def digest(texts: Iterable[Text]) -> str:
    """One sha256 over names and contents of ``texts``, in their order."""
    return hashlib.sha256("\n".join(f"{t.sha256}  {t.name}" for t in texts).encode()).hexdigest()


def standard_library(least: int = 6_000, most: int = 200_000) -> list[Text]:
    """Source files of ``least`` to ``most`` bytes of this interpreter's standard library, by name.

    Tests, tables and installed packages are left out. The default model was not trained on any of it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if (_NOT_PROSE | _SKIPPED_FOLDERS | {"dist-packages"}).intersection(inside.parts):
            continue
        if least <= path.stat().st_size <= most:
            texts.append(Text(inside.as_posix(), path.read_text("utf-8", errors="replace")))
    return texts


def corpus(name: str) -> list[Text]:
    """The texts called ``name``, one of :data:`CORPORA`; a long file is cut at line ends into texts of its own.

    ``wikitext`` is cut into its articles, ``brown`` into its 500 samples, without their tags.

    Raises:
        UserError: there is none of that name, or its files cannot be had.
    """
    if name not in CORPORA:
        raise UserError(f"there is no text {name!r}; there are {', '.join(CORPORA)}, or give files with --text")
    if name == "code":
        return standard_library()
    from . import files

    if name == "essays":
        place = files.folder(_ESSAYS)
        if place is None:
            raise UserError(
                "the essays may not be passed on: put Paul Graham's, as RULER reads them, as *.txt into text/essays of "
                "a folder that MANYHEADS_DATA names, or take --text prose"
            )
        return read([place])
    if name == "brown":
        return _brown(files.path("brown"))
    if name == "wikitext":
        parts = [(file, _ARTICLE.split(files.text(file))) for file in CORPORA[name]]
        return [
            Text(f"{file}, article {i}", part) for file, found in parts for i, part in enumerate(found) if part.strip()
        ]
    return [
        Text(f"{file}, part {i}", piece) for file in CORPORA[name] for i, piece in enumerate(_pieces(files.text(file)))
    ]


def _brown(archive: Path) -> list[Text]:
    """The samples of the Brown corpus as running text: words without tags, punctuation and quotes where they belong."""
    texts = []
    with tarfile.open(archive) as held:
        for member in sorted(held.getmembers(), key=lambda one: one.name):
            name = member.name.rpartition("/")[2]
            if not re.fullmatch(r"c[a-r]\d\d", name) or (file := held.extractfile(member)) is None:
                continue
            lines = file.read().decode("ascii", errors="replace").splitlines()
            words = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in lines if line.strip())
            texts.append(Text(f"brown, {name}", "".join(f"{_set(line)}\n" for line in words)))
    return texts


def _set(line: str) -> str:
    """A tagged corpus's words as they are printed."""
    line = re.sub(r"`` ?", '"', re.sub(r" ?''", '"', line))
    return re.sub(r" ([.,;:?!)])", r"\1", line.replace("( ", "("))


def is_code(texts: Iterable[Text]) -> bool:
    """Whether more of the characters are in files of code than in others, by the endings of their names."""
    sizes = {True: 0, False: 0}
    for text in texts:
        sizes[Path(text.name).suffix.lower() in _CODE] += len(text.content)
    return sizes[True] > sizes[False]


def _pieces(text: str) -> Iterator[str]:
    while text:
        end = text.rfind("\n", 0, _PIECE) + 1 if len(text) > _PIECE else len(text)
        end = end or _PIECE
        yield text[:end]
        text = text[end:]


def read(paths: Sequence[str | Path]) -> list[Text]:
    """Read text or code files, those below folders, sorted by path, and texts by name, one of :data:`CORPORA`.

    A file named outright must be readable UTF-8. Below a folder, binary and overlong files are passed over, and so are
    hidden ones, virtual environments and caches.

    Raises:
        UserError: a path does not exist, a named file is binary, too large or unreadable, or there is no text at all.
    """
    texts: list[Text] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = [t for t in (_try(file, path) for file in _files(path)) if t is not None]
            if not found:
                raise UserError(f"{given} holds no text file; give files or folders of UTF-8 text or code")
            texts += found
        elif path.is_file():
            texts.append(_named(path))
        elif str(given) in CORPORA:
            texts += corpus(str(given))
        else:
            raise UserError(
                f"no such file or folder: {given}; give text or code files, folders of them, or one of "
                f"{', '.join(CORPORA)}"
            )
    if sum(len(t.content) for t in texts) > MOST:
        raise UserError(f"the texts hold more than {MOST // 10**6} MB; name a folder or files that say enough")
    return texts


def _files(root: Path) -> Iterator[Path]:
    """Files below ``root`` worth a look, sorted; neither hidden ones nor symbolic links out of it."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS and not (path / "pyvenv.cfg").is_file():
                yield from _files(path)
        elif path.is_file():
            yield path


def _try(path: Path, root: Path) -> Text | None:
    try:
        if not 0 < path.stat().st_size <= LARGEST:
            return None
        content = _decode(path.read_bytes())
    except OSError:
        return None
    return None if content is None else Text(path.relative_to(root).as_posix(), content)


def _named(path: Path) -> Text:
    size = path.stat().st_size
    if size > LARGEST:
        raise UserError(
            f"{path} has {size / 1e6:.0f} MB; a text file may have {LARGEST // 10**6}: cut out a part of it"
        )
    try:
        content = _decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if content is None:
        raise UserError(f"{path} is not UTF-8 text; give text or code files")
    if not content.strip():
        raise UserError(f"{path} is empty; give a file with text")
    return Text(path.name, content)


def _decode(data: bytes) -> str | None:
    """``data`` as text with one kind of line end, None if it is binary or in another encoding."""
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
