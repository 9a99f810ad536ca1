# SPDX-License-Identifier: Apache-2.0
"""Ranking as a task: grades and depths of bundles, metrics by hand, BM25 by its formula, and a run from end to end."""

import math

import numpy as np
import pytest
import torch

from manyheads import UserError
from manyheads.data.ranking import Collection
from manyheads.experiment import Arm
from manyheads.models.ranker import RankingModel
from manyheads.tasks.training._rankings import BM25, Rankings, Texts, judged, passage_vectors
from manyheads.tasks.training.ranker_cost import RankerCost
from manyheads.tasks.training.ranking import Ranking, _stretches
from tolerance import assert_close, error, nearly

from .conftest import values

TKL, FIRST = Arm("tkl", "tkl_local:chunk=8,overlap=2"), Arm("first", "tkl_local:chunk=0,terms=5")
RULES = tuple(Arm(name, options={"ranker": name}) for name in ("bm25", "random"))
SMALL = {"dim": 8, "heads": 2, "layers": 1, "hidden": 8, "batch": 4}


@pytest.fixture(scope="module")
def collection():
    """Documents of ten words on twelve subjects, queries of two words of a subject; each subject has four documents."""
    rng = np.random.default_rng(0)
    documents, queries, qrels = {}, {}, {}
    for subject in range(12):
        own = [f"s{subject}x{i}" for i in range(6)]
        for i in range(4):
            text = [*rng.choice(own, 5), *(f"common{int(j)}" for j in rng.integers(0, 20, 5))]
            documents[f"{subject}-{i}"] = " ".join(rng.permutation(text))
        for i in range(2):
            queries[f"q{subject}-{i}"] = " ".join(rng.choice(own, 2, replace=False)) + " common1"
            qrels[f"q{subject}-{i}"] = {f"{subject}-{j}": j % 2 + 1 for j in range(4)}
    return Collection("subjects", documents, queries, qrels)


def test_bm25_is_its_formula():
    texts = [["a", "b", "a"], ["b", "c"], ["c", "d", "e", "a", "f"], ["d"]]
    index, query = BM25(texts), ["a", "c", "never"]
    mean = sum(map(len, texts)) / 4
    want = []
    for text in texts:
        score = 0.0
        for word in query:
            holding = sum(word in other for other in texts)
            if holding:
                idf, tf = math.log(1 + (4 - holding + 0.5) / (holding + 0.5)), text.count(word)
                score += idf * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(text) / mean))
        want.append(score)
    assert_close(index.scores(query), want, 1e-6)
    assert error(index.scores(["a"]), want) > 0.01  # control
    assert not index.scores(["never"]).any()


def test_ndcg_and_reciprocal_rank_by_hand():
    grades = np.array([0, 3, 0, 1, 0])
    found = judged([0.9, 0.8, 0.7, 0.6], [0, 1, 2, 3], grades, grades >= 0)
    ideal = 3 + 1 / math.log2(3)
    assert found == nearly({"ndcg": (3 / math.log2(3) + 1 / math.log2(5)) / ideal, "mrr": 0.5}, torch.float32)
    behind = judged([0.9, 0.8], [0, 2], grades, grades >= 0)  # what is not among the candidates stands behind
    assert 0 < behind["mrr"] < 0.4 and behind["ndcg"] < found["ndcg"]
    low = judged([-9.1, -9.2, -9.3, -9.4], [0, 1, 2, 3], grades, grades >= 0)
    assert low == nearly(found, torch.float32)  # of scores, only the order counts
    alone = judged([0.9, 0.8, 0.7, 0.6], [0, 1, 2, 3], grades, np.array([True, False, True, True, True]))
    assert alone["mrr"] == nearly(1 / 3, torch.float32)  # the better one is as if it were not


def test_bundles_are_as_good_as_their_best_part_and_know_where_it_stands(collection):
    held = Rankings.of(
        Texts.read(collection), parts=3, count=4, fold=1, candidates=10, order=np.random.default_rng(0),
        rng=np.random.default_rng(1),
    )  # fmt: skip
    assert len(held.bundles) == 16 and all(len(some) == 10 for some in held.chosen.values())
    query = held.test[0]
    qrels, grades, depths = collection.qrels[query], held.grades(query), held.depths(query, (10, 20))
    for one, grade, depth in zip(held.bundles, grades, depths, strict=True):
        places = [i for i, part in enumerate(one.parts) if part in qrels]
        assert grade == max(qrels.get(part, 0) for part in one.parts)
        assert depth == (places[0] if len(places) == 1 else -1)  # parts have ten words each
    assert {*depths.tolist()} > {-1}


def test_pairs_are_of_one_relevant_document_and_one_that_has_none(collection):
    texts, seen = Texts.read(collection), set()
    queries = collection.judged[:6]
    for query, better, worse in texts.pairs(queries, 60, 3, np.random.default_rng(0)):
        relevant = [part in collection.qrels[query] for part in better]
        assert sum(relevant) == 1 and not any(part in collection.qrels[query] for part in worse)
        seen.add((query, relevant.index(True)))
    assert len({q for q, _ in seen}) == 6 and {place for _, place in seen} == {0, 1, 2}
    assert all(part not in collection.qrels[q] for q in queries for part in texts.hard[q])


@pytest.fixture(scope="module")
def results(collection, tmp_path_factory):
    from manyheads.experiment import Experiment, run

    out = tmp_path_factory.mktemp("ranking")
    task = Ranking(
        **SMALL, parts=3, folds=4, steps=60, rates=(1e-4, 3e-3), tune_steps=12, looks=2, candidates=0, edges=(10,)
    )
    arms = (TKL, FIRST, *RULES)
    experiment = Experiment(subject="trainable", arms=arms, baseline=TKL, tasks=(task,), equal="parameters", seeds=2)
    return run(experiment.at("cpu"), out, data={"collection": collection})


def test_a_trained_ranker_ranks_what_it_never_trained_on(results):
    def mean(metric, arm, **where):
        found = [value for _, _, _, at, value in values(results, metric, arm) if at == where]
        return sum(found) / len(found)

    assert mean("ndcg", "tkl") > mean("ndcg", "random") + 0.2
    assert mean("ndcg", "bm25") > mean("ndcg", "random") + 0.2
    stretch = _stretches((10,))
    assert stretch == ["0 to 9", "10 on"]
    near, far = ({"depth": name} for name in stretch)
    assert mean("ndcg_by_depth", "tkl", **far) > mean("ndcg_by_depth", "first", **far) + 0.1  # it reads five words
    assert mean("ndcg_by_depth", "tkl", **near) > 0.3


def test_rows_are_paired_by_query_and_every_fold_has_its_own(results):
    by_arm = {arm: {(s, seed) for a, s, seed, _, _ in values(results, "mrr") if a == arm} for arm in ("tkl", "bm25")}
    assert by_arm["tkl"] == by_arm["bm25"] and len(by_arm["tkl"]) == 12
    assert len({sample for sample, _ in by_arm["tkl"]}) == 12  # no query is tested twice
    tuned = [row for row in results.rows if row.metric == "tuning_ndcg"]
    assert len(tuned) == 4 and all(len(row.about["losses"]) == 8 for row in tuned)
    rates = {(row.arm, row.about["rate"]) for row in tuned}
    assert ("tkl", 3e-3) in rates and len(rates) == 2  # each arm keeps to the rate of its first fold


def test_the_model_is_kept_for_the_user(results, collection):
    model = RankingModel.load(results.folder / "models" / "tkl" / "ranking-0")
    ranked = model.rank(collection.queries["q0-0"], list(collection.documents.values()))
    assert len(ranked) == 48 and ranked[0][1] > ranked[-1][1]


def test_passages_are_embedded_as_alone():
    class Tokens(dict):
        def to(self, device):
            return self

    def tokenizer(texts, **given):
        rows = [[len(word) for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        return Tokens(input_ids=ids, attention_mask=(ids > 0).long())

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.device = torch.nn.Embedding(9, 3), "cpu"

        def forward(self, input_ids, attention_mask):
            return type("Out", (), {"last_hidden_state": self.embed(input_ids)})

    torch.manual_seed(0)
    model, texts = Model(), {"a": ["xx"] * 3, "b": ["x", "xxxx"] * 100, "c": ["xxx"]}
    found = passage_vectors(model, tokenizer, texts)
    assert [len(found[name]) for name in "abc"] == [1, 2, 1]
    assert_close(found["b"].norm(dim=1), torch.ones(2), 1e-6)
    assert_close(found["b"][1], torch.nn.functional.normalize(model.embed.weight[[1, 4]].mean(0), dim=0), 1e-6)


def test_cost_counts_what_is_kept(measured):
    arms = (TKL, Arm("full", "tkl_local:chunk=0"))
    task = RankerCost(dim=8, heads=2, layers=1, hidden=8, lengths=(64, 256), words=256, rounds=2)
    found = measured(task, arms=(*arms, RULES[0]))
    kept = {(arm, at["attention"], at["terms"]): value for arm, _, _, at, value in values(found, "kept")}
    assert len(kept) == 2 * 2 * 2 and len(values(found, "kept")) == 3 * len(kept)  # of three documents each
    growth = {key: kept[(*key, 256)] / kept[(*key, 64)] for key in {key[:2] for key in kept}}
    for key in (("tkl", "fused"), ("tkl", "map"), ("full", "fused")):
        assert 3 < growth[key] < 4.5  # linear where no map is kept, but for what a query takes
    held = 2 * 256**2 * 4  # a map of each head, float32
    assert kept["full", "map", 256] - kept["full", "fused", 256] > held
    assert len(values(found, "document_time")) == 2 * 2 * 2
    with pytest.raises(UserError, match="do not part"):
        RankerCost(lengths=(300,), words=1000)


def test_errors(collection, measured):
    with pytest.raises(UserError, match="10 candidates"):
        Ranking(candidates=5)
    with pytest.raises(UserError, match="folds 3 or more"):
        Ranking(folds=2)
    with pytest.raises(UserError, match="no collection nowhere"):
        measured(Ranking(collection="nowhere", **SMALL), arms=(TKL,))
    with pytest.raises(UserError, match="softmax ranks no documents"):
        measured(Ranking(**SMALL), arms=(Arm("softmax", "softmax"),), data={"collection": collection})
