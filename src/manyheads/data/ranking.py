# SPDX-License-Identifier: Apache-2.0
"""Collections to rank: documents, queries, and which document says how much to which query.

``cranfield`` by name, or a folder of yours:

    corpus.jsonl     {"_id": "d1", "title": "...", "text": "..."}      a line a document, the title may be missing
    queries.jsonl    {"_id": "q1", "text": "..."}
    qrels.tsv        query, document, grade, where a first line of names is passed over; or query, 0, document, grade

The first is BEIR's form of judgements, the other TREC's. With ``qrels/test.tsv`` and ``qrels/train.tsv`` in their place
the queries of the one test and those of the other train.

Long documents of short ones: :func:`bundled` lays several after each other. They are made up, of real text and real
judgements: a bundle is as good as its best part, and where that stands is known.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError

__all__ = ["NAMES", "Bundle", "Collection", "bundled", "collection", "folds", "words"]

NAMES = ("cranfield",)
_WORD = re.compile(r"[^\W_]+")
_HIGHEST = 5  # Cleverdon's codes fall from 1, a complete answer, to 4, minimum interest; -1 is none


@dataclass(frozen=True)
class Collection:
    """What there is to rank.

    Attributes:
        name: as a person names it.
        documents, queries: text by id.
        qrels: by query, the grades above 0 of documents by id.
        tested: queries that only test, where the collection says so.
    """

    name: str
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    tested: frozenset[str] = frozenset()

    @property
    def judged(self) -> list[str]:
        """Queries that some document is relevant to, in the collection's order."""
        return [query for query in self.queries if self.qrels.get(query)]


@dataclass(frozen=True)
class Bundle:
    """A document of several.

    Attributes:
        parts: ids of the documents, in their order.
        starts: words before each.
        words: of all.
    """

    parts: tuple[str, ...]
    starts: tuple[int, ...] = field(repr=False)
    words: tuple[str, ...] = field(repr=False)


def words(text: str) -> list[str]:
    """Words and numbers of a text in lower case."""
    return _WORD.findall(text.lower())


def collection(given: str | Path | Collection) -> Collection:
    """The collection of that name, one of :data:`NAMES`, or in that folder.

    Raises:
        UserError: there is none, or a file of it is not what it should be.
    """
    if isinstance(given, Collection):
        return given
    folder = Path(given).expanduser()
    if folder.is_dir():
        return _read(folder)
    if str(given) == "cranfield":
        return _cranfield()
    raise UserError(
        f"there is no collection {given}; give {', '.join(NAMES)}, or a folder with corpus.jsonl, queries.jsonl and "
        "qrels.tsv"
    )


def folds(found: Collection, count: int, fold: int, rng: np.random.Generator) -> tuple[list[str], list[str], list[str]]:
    """Queries to train on, to choose by, and to test on: fold number ``fold`` of ``count`` tests, the next one chooses.

    A collection that says which queries test keeps to it; of the others one in ``count`` chooses.

    Raises:
        UserError: there are too few.
    """
    judged = found.judged
    if len(judged) < 3 * count:
        raise UserError(
            f"{found.name} has {len(judged)} judged queries; {3 * count} are needed to train and to test on"
        )
    drawn = [judged[i] for i in rng.permutation(len(judged))]
    tested = [query for query in drawn if query in found.tested] or drawn[fold % count :: count]
    rest = drawn if found.tested else [q for i, q in enumerate(drawn) if i % count != fold % count]
    rest = [query for query in rest if query not in found.tested]
    step = count - (not found.tested)
    return [q for i, q in enumerate(rest) if i % step], rest[::step], tested


def bundled(texts: Mapping[str, Sequence[str]], parts: int, rng: np.random.Generator) -> list[Bundle]:
    """All documents, ``parts`` of them to a bundle in a drawn order; the last may have fewer.

    Args:
        texts: words by id.
        parts: 1 leaves documents as they are.
        rng: of the order.
    """
    ids = list(texts)
    order = [ids[i] for i in rng.permutation(len(ids))] if parts > 1 else ids
    return [bundle(order[i : i + parts], texts) for i in range(0, len(order), parts)]


def bundle(parts: Sequence[str], texts: Mapping[str, Sequence[str]]) -> Bundle:
    """These documents after each other."""
    lengths = [len(texts[part]) for part in parts]
    starts = (0, *np.cumsum(lengths)[:-1].tolist())
    return Bundle(tuple(parts), starts, tuple(word for part in parts for word in texts[part]))


def _cranfield() -> Collection:
    from . import files

    with tarfile.open(files.path("cranfield")) as held:
        read = {name: _member(held, name) for name in ("cran.all.1400", "cran.qry", "cranqrel")}
    documents = {name: fields["W"] for name, fields in _marked(read["cran.all.1400"]) if fields.get("W")}
    # The judgements number the queries by their place, not by their own number.
    queries = {f"{i}": fields["W"] for i, (_, fields) in enumerate(_marked(read["cran.qry"]), 1)}
    qrels: dict[str, dict[str, int]] = {}
    for line in read["cranqrel"].splitlines():
        query, document, code = line.split()[:3]
        if 0 < int(code) < _HIGHEST and document in documents:  # one that is judged has no text
            qrels.setdefault(query, {})[document] = _HIGHEST - int(code)
    return Collection("cranfield", documents, queries, qrels)


def _member(held: tarfile.TarFile, name: str) -> str:
    file = held.extractfile(name)
    if file is None:
        raise UserError(f"cranfield: {name} is missing in its archive; take it away, so that it is fetched again")
    return file.read().decode("latin-1")


def _marked(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Number and fields of what ``.I`` begins; a field is begun by a line of a full stop and a letter."""
    for record in re.split(r"(?m)^\.I ", text)[1:]:
        number, _, body = record.partition("\n")
        pieces = re.split(r"(?m)^\.([A-Z])\s*$", body)
        yield number.strip(), {name: content.strip() for name, content in zip(pieces[1::2], pieces[2::2], strict=True)}


def _read(folder: Path) -> Collection:
    documents = {
        _text(row, "_id", "corpus.jsonl"): f"{row.get('title') or ''} {_text(row, 'text', 'corpus.jsonl')}".strip()
        for row in _rows(folder / "corpus.jsonl")
    }
    queries = {
        _text(row, "_id", "queries.jsonl"): _text(row, "text", "queries.jsonl")
        for row in _rows(folder / "queries.jsonl")
    }
    qrels: dict[str, dict[str, int]] = {}
    tested: set[str] = set()
    if (test := folder / "qrels" / "test.tsv").is_file():
        tested = set(_judge(test, qrels))
        for name in ("train.tsv", "dev.tsv"):
            if (file := folder / "qrels" / name).is_file():
                _judge(file, qrels)
        if not set(qrels) - tested:  # all are test queries: folds of them train
            tested = set()
    else:
        _judge(folder / "qrels.tsv", qrels)
    if unknown := next((d for found in qrels.values() for d in found if d not in documents), None):
        raise UserError(f"{folder}: the judgements name document {unknown}, which corpus.jsonl has not")
    return Collection(folder.name, documents, queries, qrels, frozenset(tested))


def _judge(file: Path, qrels: dict[str, dict[str, int]]) -> list[str]:
    """Take the judgements of a file; the queries that have one."""
    found = []
    for number, line in enumerate(_lines(file), 1):
        cells = line.split("\t") if "\t" in line else line.split()
        try:
            query, document, grade = (cells[0], cells[-2], int(cells[-1])) if 3 <= len(cells) <= 4 else ("", "", 0)
        except ValueError:
            query, grade = "", 0
            if number == 1:  # names of columns
                continue
        if not query:
            raise UserError(f"{file}, line {number}: query, document and a whole grade are needed, not {line[:60]!r}")
        found.append(query)
        if grade > 0:
            qrels.setdefault(query, {})[document] = grade
    return found


def _rows(file: Path) -> Iterator[Mapping[str, object]]:
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is no JSON object; write one on each line")
        yield row


def _text(row: Mapping[str, object], name: str, file: str) -> str:
    if not isinstance(found := row.get(name), str | int):
        raise UserError(f"{file}: each line needs a {name!r}, one has {', '.join(map(repr, row))}")
    return str(found)


def _lines(file: Path) -> Iterable[str]:
    try:
        return [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as UTF-8 text; a collection is corpus.jsonl, queries.jsonl and qrels.tsv"
        ) from error
