# SPDX-License-Identifier: Apache-2.0
"""Collections from a folder and by name, folds of their queries, and documents laid together."""

import json

import numpy as np
import pytest

from manyheads import UserError
from manyheads.data import files
from manyheads.data.ranking import Collection, bundled, collection, folds, words


def written(folder, qrels="query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\td1\t0\n", where="qrels.tsv"):
    documents = [
        {"_id": "d1", "title": "Wings", "text": "of birds"},
        {"_id": "d2", "text": "Lift, and drag: 3 studies_of it"},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "lift"}\n\n{"_id": "q2", "text": "drag"}\n')
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).write_text(qrels)
    return folder


def test_a_folder_in_beirs_format(tmp_path):
    found = collection(written(tmp_path))
    assert found.documents == {"d1": "Wings of birds", "d2": "Lift, and drag: 3 studies_of it"}
    assert found.qrels == {"q1": {"d2": 2}} and found.judged == ["q1"] and not found.tested
    assert words(found.documents["d2"]) == ["lift", "and", "drag", "3", "studies", "of", "it"]


def test_trecs_judgements_and_parts_of_their_own(tmp_path):
    assert collection(written(tmp_path, "q1 0 d2 1\nq2 0 d1 3\n")).qrels == {"q1": {"d2": 1}, "q2": {"d1": 3}}
    written(tmp_path, "query-id\tcorpus-id\tscore\nq2\td1\t1\n", "qrels/test.tsv")
    assert not collection(tmp_path).tested  # all that is judged: folds of them train
    written(tmp_path, "query-id\tcorpus-id\tscore\nq1\td2\t1\n", "qrels/train.tsv")
    assert collection(tmp_path).tested == {"q2"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels.tsv", "q1\td2\t1\nq1\td2\n", "line 2: query, document and a whole grade"),
        ("qrels.tsv", "q1\td2\t1\nq1\td2\thigh\n", "line 2: query, document and a whole grade"),
        ("qrels.tsv", "q1\td9\t1\n", "document d9, which corpus.jsonl has not"),
        ("corpus.jsonl", "d1 wings\n", "line 1 is no JSON object"),
        ("queries.jsonl", '{"id": "q1", "text": "x"}\n', "each line needs a '_id'"),
    ],
)
def test_a_wrong_file_is_said_in_a_line(tmp_path, file, content, message):
    (written(tmp_path) / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        collection(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"corpus\.jsonl cannot be read"):
        collection(tmp_path)
    with pytest.raises(UserError, match="no collection cranfeld; give cranfield, or a folder"):
        collection("cranfeld")


def some(judged, tested=()):
    names = [f"q{i}" for i in range(judged + 2)]
    qrels = {name: {"d": 1} for name in names[:judged]}
    return Collection("some", {"d": "word"}, dict.fromkeys(names, "word"), qrels, frozenset(tested))


def test_every_query_is_tested_in_one_fold_and_never_by_what_trained_on_it():
    found, parts = some(31), []
    for fold in range(5):
        train, tuning, test = folds(found, 5, fold, np.random.default_rng(0))
        assert sorted(train + tuning + test) == sorted(found.judged) and len({*train, *tuning, *test}) == 31
        assert 5 <= len(tuning) <= 7 and 5 <= len(test) <= 7
        parts.append(test)
    assert sorted(query for part in parts for query in part) == sorted(found.judged)
    again = folds(found, 5, 0, np.random.default_rng(1))[2]
    assert sorted(again) != sorted(parts[0])  # control: another order, other folds
    with pytest.raises(UserError, match="9 judged queries; 15 are needed"):
        folds(some(9), 5, 0, np.random.default_rng(0))


def test_a_collections_own_test_queries():
    found = some(20, ("q3", "q7"))
    for fold in (0, 1):
        train, tuning, test = folds(found, 5, fold, np.random.default_rng(0))
        assert sorted(test) == ["q3", "q7"] and len(tuning) == 4 and len(train) == 14
        assert not {*train, *tuning} & {*test}


def test_bundles_hold_every_document_once():
    texts = {f"d{i}": [f"w{i}"] * (i + 1) for i in range(7)}
    found = bundled(texts, 3, np.random.default_rng(0))
    assert sorted(part for one in found for part in one.parts) == sorted(texts) and [len(x.parts) for x in found] == [
        3,
        3,
        1,
    ]
    for one in found:
        for part, start in zip(one.parts, one.starts, strict=True):
            assert list(one.words[start : start + len(texts[part])]) == texts[part]
    assert [one.parts for one in bundled(texts, 1, np.random.default_rng(0))] == [(name,) for name in texts]


@pytest.mark.skipif(files.local("cranfield") is None, reason="this file is neither in MANYHEADS_DATA nor in the cache")
def test_cranfield():
    found = collection("cranfield")
    assert len(found.documents) == 1398 and len(found.queries) == len(found.judged) == 225
    assert found.queries["1"].startswith("what similarity laws must be obeyed")
    assert found.qrels["1"]["184"] == 3 and found.qrels["1"]["12"] == 2  # codes 2 and 3: less is better there
    assert sum(map(len, found.qrels.values())) == 1611 and {g for x in found.qrels.values() for g in x.values()} == {
        1,
        2,
        3,
        4,
    }
