# SPDX-License-Identifier: Apache-2.0
"""Fidelity of embeddings: exact arms have none to lose, ranks are Spearman's, and too little text is said."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import BertConfig, BertModel

from manyheads.data.texts import Text
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, run
from manyheads.tasks.text import _reader
from manyheads.tasks.text.embedding_fidelity import EmbeddingFidelity, rank_correlations
from tolerance import is_far

EXACT = Arm("exact")
ARMS = (EXACT, Arm("all", "mra:per_row=5,block=8"), Arm("few", "mra:per_row=1,block=8"), Arm("none", "mra:per_row=0"))


class Words:
    """A tokenizer of single characters."""

    cls_token_id, sep_token_id = 1, 2

    def encode(self, text, **_):
        return [5 + ord(letter) % 90 for letter in text]


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        initializer_range=0.3,
    )  # fmt: skip
    parts = BertModel(config, add_pooling_layer=False).eval(), Words()
    monkeypatch.setattr(_reader, "reader", lambda run, model: parts)
    monkeypatch.setattr("manyheads.tasks.text.embedding_fidelity.reader", lambda run, model: parts)


def texts(count):
    rng = np.random.default_rng(0)
    return [Text(f"{i}", "".join(map(chr, rng.integers(97, 123, 60)))) for i in range(count)]


def test_arms_beside_the_model_as_it_is(small, tmp_path):
    task = EmbeddingFidelity(length=40, samples=6)
    experiment = Experiment(subject="trainable", arms=ARMS, baseline=EXACT, tasks=(task,))
    results = run(experiment.at("cpu"), tmp_path / "run", data={"texts": texts(8)})
    found = {}
    for row in results.rows:
        found.setdefault((row.metric, row.arm), []).append(row.value)
    assert all(len(values) == 6 for values in found.values()) and len(found) == 8
    assert set(found["embedding_error", "exact"]) == {0.0}
    assert found["agreement", "exact"] == pytest.approx([1.0] * 6)
    assert max(found["embedding_error", "all"]) < 1e-5
    for arm in ("few", "none"):
        assert min(found["embedding_error", arm]) > 1e-4  # control: another attention is seen
        assert max(found["embedding_error", arm]) <= 2 and max(map(abs, found["agreement", arm])) <= 1 + 1e-9


def test_agreement_is_spearmans():
    one, other = (torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1) for _ in range(2))
    got = rank_correlations(one, other)
    for i, value in enumerate(got.tolist()):
        rest = [j for j in range(7) if j != i]
        assert value == pytest.approx(spearmanr((one @ one.T)[i, rest], (other @ other.T)[i, rest]).statistic)
    assert is_far(got, torch.ones_like(got))


def test_errors(small, tmp_path):
    with pytest.raises(UserError, match="3 samples"):
        EmbeddingFidelity(samples=2)
    experiment = Experiment(
        subject="trainable", arms=ARMS, baseline=EXACT, tasks=(EmbeddingFidelity(length=40, samples=9),)
    )
    with pytest.raises(UserError, match="9 texts of 38 tokens"):
        run(experiment.at("cpu"), tmp_path / "run", data={"texts": texts(8)})
