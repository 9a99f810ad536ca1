# SPDX-License-Identifier: Apache-2.0
"""A ranking model: its words, scores of many pairs as of one, what it writes, and what it ranks for a user."""

from itertools import pairwise

import pytest
import torch

from manyheads import UserError
from manyheads.models.ranker import PAD, UNKNOWN, RankingModel, padded, vocabulary
from manyheads.models.word_vectors import word_vectors
from manyheads.strategy import RankerConfig
from tolerance import SAME, assert_close, error

CONFIG = RankerConfig(dim=8, heads=2, layers=1, hidden=8, query=4)
WORDS = [f"w{i}" for i in range(30)]
DOCUMENTS = [[WORDS[(i * j + j) % 30] for j in range(length)] for i, length in enumerate((3, 41, 90, 1, 60, 17))]


def made(spec="tkl_local:chunk=10,overlap=2"):
    torch.manual_seed(0)
    model = RankingModel(spec, WORDS, CONFIG).double().eval().requires_grad_(False)
    torch.nn.init.normal_(model.ranker.passages.dense.weight, std=0.3)
    return model


@pytest.mark.parametrize("spec", ["tkl_local:chunk=10,overlap=2", "tkl_local:chunk=0", "tkl_local:regions=0,terms=50"])
def test_scores_of_many_are_those_of_each_pair(spec, monkeypatch):
    monkeypatch.setattr("manyheads.models.ranker._AT_ONCE", 130)  # several groups
    monkeypatch.setattr("manyheads.models.ranker._PAIRS", {"cpu": 1})
    model, queries = made(spec), [["w1", "w9"], ["w3"], ["w7", "nothing", "w2", "w1", "w4"]]
    chosen = [[0, 1, 2, 3, 4, 5], [5, 2], [4]]
    got = model.scores(queries, DOCUMENTS, chosen)
    want = [
        [float(model(model.queries([query]), model.documents([DOCUMENTS[i]]))) for i in some]
        for query, some in zip(queries, chosen, strict=True)
    ]
    assert_close([x for row in got for x in row], [x for row in want for x in row], SAME)
    assert error(got[0], want[0][::-1]) > 0.01  # control: another order


def test_only_the_words_that_are_read_count():
    model = made("tkl_local:terms=20")
    first, other = DOCUMENTS[2], [*DOCUMENTS[2][:20], *WORDS]
    assert (
        model.scores([["w1"]], [first, other], [[0, 1]])[0][0] == model.scores([["w1"]], [first, other], [[0, 1]])[0][1]
    )
    assert made().scores([["w1"]], [first], [[0]]) != made().scores([["w1"]], [other], [[0]])
    assert model.queries([["w1", "w2", "w3", "w4", "w5"]]).shape == (1, 4)
    assert model.numbered(["w0", "never", "w29"]) == [2, UNKNOWN, 31]


def test_unknown_words_are_as_padding_where_they_end_a_text():
    model = made()
    plain, more = ([*DOCUMENTS[1], *tail] for tail in ((), ("never",) * 7))
    assert_close(model.scores([["w1"]], [plain], [[0]])[0], model.scores([["w1"]], [more], [[0]])[0], SAME)


def test_it_is_read_as_it_was_written(tmp_path):
    model = made()
    model.save(tmp_path)
    again = RankingModel.load(tmp_path)
    assert again.strategy == model.strategy and again.config == CONFIG and not again.training
    text = ["w1 w2 w9 " * 30, "w4", "w9, w9 W1?"]
    ranked, want = again.rank("W1 w9", text), model.rank("w1 w9", text)
    assert [i for i, _ in ranked] == [i for i, _ in want]
    assert_close([score for _, score in ranked], [score for _, score in want], 4 * SAME)  # written from float64
    assert sorted(i for i, _ in ranked) == [0, 1, 2] and ranked == sorted(ranked, key=lambda pair: -pair[1])
    with pytest.raises(UserError, match="none of the words"):
        model.rank("nothing known", text)
    with pytest.raises(UserError, match="holds no ranking model"):
        RankingModel.load(tmp_path / "elsewhere")


def test_what_ranks_nothing_is_refused():
    with pytest.raises(UserError, match="softmax ranks no documents"):
        RankingModel("softmax", WORDS)


def test_vocabulary_and_padding():
    assert vocabulary([["b", "a", "b"], ["a", "c"]], 2, 9) == ["a", "b"]
    assert vocabulary([["b", "a", "b"], ["c"]], 1, 1) == ["b"]
    assert padded([[5], [], [6, 7]]).tolist() == [[5, PAD], [PAD, PAD], [6, 7]] and padded([[]]).shape == (1, 1)


def test_words_of_one_company_are_near():
    generator = torch.Generator().manual_seed(0)
    texts = []
    for i in range(400):  # two subjects of ten words each, and ten that stand everywhere
        subject = torch.randint(10, (6,), generator=generator) + 2 + 10 * (i % 2)
        common = torch.randint(10, (4,), generator=generator) + 22
        order = torch.randperm(10, generator=generator)
        texts.append(torch.cat([subject, common])[order].tolist())
    vectors = word_vectors(texts, 32, 6)
    assert vectors.shape == (32, 6) and not vectors[:2].any()
    assert_close(vectors[2:].square().mean().sqrt(), 0.35, 1e-6)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    one, other = unit[2:12], unit[12:22]
    assert (one @ one.T).mean() > 0.6 and (one @ other.T).mean() < 0.3
    again = word_vectors(texts, 32, 6)
    assert torch.equal(vectors, again)
    mixed = word_vectors([[*a[:5], *b[5:]] for a, b in pairwise(texts)], 32, 6)  # control
    unit = torch.nn.functional.normalize(mixed, dim=1)
    assert (unit[2:12] @ unit[12:22].T).mean() > (one @ other.T).mean()
