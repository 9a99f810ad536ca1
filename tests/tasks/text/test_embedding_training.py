# SPDX-License-Identifier: Apache-2.0
"""Embeddings trained under each arm: equal parameters, and values that follow from their cosines."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from manyheads.data import files
from manyheads.data.ranking import Collection
from manyheads.data.sentences import Pair, pairs, requests
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, run
from manyheads.experiment.subjects import Convertible
from manyheads.tasks._statistics import rank_correlation_values
from manyheads.tasks.text import embedding_training
from manyheads.tasks.text.embedding_training import EmbeddingTraining, _word_vectors, cosines, triples
from oracles.conversions import tiny
from oracles.texts import words_tokenizer

ARMS = (
    Arm("eos", "pooling:mask=causal,pooling=eos"), Arm("layers", "pooling:heads=6,latents=3,mult=1"),
    Arm("as it is", "pooling:pooling=mean", options={"steps": 0}), Arm("words", options={"encoder": "words"}),
)  # fmt: skip


def sentence(rng):
    return " ".join(f"w{n}" for n in rng.integers(3, 60, 4))


@pytest.fixture
def small(monkeypatch):
    rng = np.random.default_rng(0)
    similar = [Pair(f"{i}", sentence(rng), sentence(rng), float(rng.integers(0, 6)), "", "test") for i in range(12)]
    documents = {f"d{i}": sentence(rng) for i in range(20)}
    qrels = {f"q{i}": {f"d{2 * i}": 3, f"d{2 * i + 1}": 1} for i in range(5)}
    found = Collection("made", documents, {query: sentence(rng) for query in qrels}, qrels)
    monkeypatch.setattr(embedding_training, "pairs", lambda name: similar)
    monkeypatch.setattr(embedding_training, "collection", lambda name: found)
    three = [tuple(sentence(rng) for _ in range(3)) for _ in range(9)]
    monkeypatch.setattr(embedding_training, "triples", lambda: three)
    return similar, found


def test_arms_train_as_many_parameters_and_are_judged_by_cosines(small, monkeypatch, tmp_path):
    similar, found = small
    seen = {}

    def judged(task, given, encode, whole=EmbeddingTraining._judged):
        values = whole(task, given, encode)
        seen[len(seen)] = encode, values
        return values

    monkeypatch.setattr(EmbeddingTraining, "_judged", judged)
    task = EmbeddingTraining(
        sets=("sts-2014-images",), samples=12, queries=3, documents=14, steps=2, batch=3, rank=2, layers=2
    )  # fmt: skip
    subject = Convertible("tiny", tiny("llama").float(), words_tokenizer())
    results = run(Experiment(subject=subject, arms=ARMS, baseline=ARMS[0], tasks=(task,), seeds=2).at("cpu"), tmp_path)
    rows = {}
    for row in results.rows:
        rows.setdefault((row.metric, row.arm, row.seed), {})[row.sample] = row.value
    trained = {arm: value["model"] for (metric, arm, _), value in rows.items() if metric == "trained_parameters"}
    assert set(trained) == {"eos", "layers"}
    assert trained["eos"] == pytest.approx(trained["layers"], rel=0.05)  # a rank more or less
    assert len(seen) == 6  # what is not trained is judged once
    for arm in ("as it is", "words"):
        for metric in ("similarity", "ndcg"):
            assert rows[metric, arm, 0] == rows[metric, arm, 1]
    assert rows["similarity", "eos", 0] != rows["similarity", "eos", 1]
    encode, (values, ranked) = seen[0]
    chosen = [next(s for s in similar if f"sts-2014-images {s.name}" == name) for name in rows["similarity", "eos", 0]]
    assert len(chosen) == 12 and list(rows["similarity", "eos", 0].values()) == values["sts-2014-images"]
    one, two = (encode([getattr(s, side) for s in chosen]) for side in ("first", "second"))
    said = torch.cosine_similarity(one.double(), two.double()).numpy()
    want = rank_correlation_values(said, [s.score for s in chosen])
    assert values["sts-2014-images"] == pytest.approx(want.tolist(), abs=1e-6)
    names = [name.removeprefix("query ") for name in rows["ndcg", "eos", 0]]
    assert len(names) == 3 == len(ranked) and all(0 <= value <= 1 for value in ranked)
    assert all(sum(d in found.documents for d in found.qrels[name]) == 2 for name in names)


def test_pseudo_values_have_the_correlation_as_their_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200).round(1)
    y = (x + rng.normal(size=200)).round(1)
    values = rank_correlation_values(x, y)
    assert values.mean() == pytest.approx(spearmanr(x, y)[0], abs=0.01)
    without = [spearmanr(np.delete(x, i), np.delete(y, i))[0] for i in (0, 7)]
    assert values[[0, 7]] == pytest.approx([200 * spearmanr(x, y)[0] - 199 * r for r in without], abs=1e-6)
    assert abs(rank_correlation_values(x, rng.permutation(y)).mean()) < 0.3  # control: nothing in common


def test_rare_words_weigh_more_and_word_vectors_see_overlap():
    vectors = _word_vectors(["the cat sat", "the cat ran", "the dog barked", "a bird"])
    a, b, c, d = torch.nn.functional.normalize(vectors, dim=1)
    assert a @ b > a @ c > a @ d == 0
    assert cosines(vectors)[0] == pytest.approx(float(a @ c))


def test_published_pairs_are_whole():
    if any(files.local(name) is None for name in ("snips", "sick-train", "sick-test", "sts-2014-images")):
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    found = requests()
    assert (
        len(found) == 14_484 and len({one.name for one in found}) == 14_484 and len({one.intent for one in found}) == 7
    )
    sick, images = pairs("sick"), pairs("sts-2014-images")
    assert [sum(one.part == part for one in sick) for part in ("train", "test")] == [4500, 4927] and len(images) == 750
    assert {one.relation for one in sick} == {"ENTAILMENT", "CONTRADICTION", "NEUTRAL"}
    assert all(1 <= one.score <= 5 for one in sick) and all(0 <= one.score <= 5 for one in images)
    three = triples()
    known = {(one.first, one.second): one for one in sick if one.part == "train"}
    assert len(three) > 300 and all(len({*some}) == 3 for some in three)
    assert all(known[one, two].relation == "ENTAILMENT" for one, two, _ in three)
    for one, _, other in three:
        apart = known.get((one, other)) or known[other, one]
        assert apart.relation == "CONTRADICTION" or apart.score < 3.5


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="no pairs of sentences 'x'"):
        pairs("x")
    for wrong in ({"sets": ("x",)}, {"sets": ()}, {"samples": 2}, {"documents": 5}):
        with pytest.raises(UserError):
            EmbeddingTraining(**wrong)
