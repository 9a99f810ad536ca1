# SPDX-License-Identifier: Apache-2.0
"""Code search: ranks by hand, embeddings that padding does not change, files on one side only, and dealt weights."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from manyheads.data.texts import Text
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, RunContext, Trainable, run
from manyheads.tasks.text import code_search
from manyheads.tasks.text.code_search import CodeSearch, _dealt, _embedded, reciprocal_ranks
from manyheads.text_reducing import TextWeights
from tiny.tokenizers import words_of
from tolerance import SAME, is_close

SIZES = {"shortest": 5, "longest": 200, "batch": 3, "samples": 6, "learned": 4, "per_file": 2}
ARMS = (
    Arm("diet", "dietcode", 0.5), Arm("dealt", "dietcode", 0.5, options={"shuffled": True}),
    Arm("slim", "slimcode", 0.5),
)  # fmt: skip


def files():
    """Six files of four functions."""
    body = "\n".join(f"    x{i} = call_{i}(x, {i})" for i in range(4))
    made = 'def f{0}_{1}(x):\n    """Says number {0} of kind {1} here."""\n{2}\n    return {0}{1}\n'
    return [Text(f"{n}.py", "".join(made.format(n, i, body) for i in range(1, 5))) for n in range(1, 7)]


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        initializer_range=0.3,
    )  # fmt: skip
    parts = BertModel(config, add_pooling_layer=False).eval(), words_of()
    monkeypatch.setattr(code_search, "reader", lambda run, model: parts)
    return parts


def test_every_arm_on_the_same_functions(small, tmp_path):
    task = CodeSearch(**SIZES)
    experiment = Experiment(subject="trainable", arms=ARMS, tasks=(task,), seeds=1)
    rows = run(experiment.at("cpu"), tmp_path / "run", data={"texts": files()}).rows
    found = {}
    for row in rows:
        found.setdefault((row.metric, row.arm), []).append(row)
    assert {len(values) for (metric, _), values in found.items() if metric != "seconds"} == {6}
    for arm in ("full", *(arm.key for arm in ARMS)):
        assert all(1 / 6 <= row.value <= 1 for row in found["reciprocal_rank", arm])
        assert len({row.context for row in found["reciprocal_rank", arm]}) == 3
        kept = [row.value for row in found["kept", arm]]
        assert kept == [1.0] * 6 if arm == "full" else 0.4 < np.mean(kept) <= 0.51
    values = {arm: [row.value for row in found["reciprocal_rank", arm]] for arm in ("full", ARMS[0].key)}
    assert values["full"] != values[ARMS[0].key]


def test_files_stand_on_one_side(small):
    task, made = CodeSearch(**SIZES), RunContext(Trainable(), (Arm("full"),), data={"texts": files()})
    drawn = task._drawn(made)
    assert {f.module for f in drawn.sought}.isdisjoint({f.module for f in drawn.others})
    assert len(drawn.sought) == 6 and len(drawn.others) == 4
    few = CodeSearch(**SIZES | {"samples": 60})
    assert "fewer than 60" in few.unsupported_reason(RunContext(Trainable(), (Arm("full"),), data={"texts": files()}))
    with pytest.raises(UserError, match="2 functions"):
        CodeSearch(samples=1)


def test_ranks():
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = torch.tensor([[5.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert reciprocal_ranks(queries, documents).tolist() == pytest.approx([1.0, 1 / 3, 1.0])
    assert reciprocal_ranks(queries[:2], torch.ones(2, 2)).tolist() == [0.5, 0.5]  # equal ones: the last place


def test_padding_changes_no_embedding(small):
    model, tokenizer = small
    texts = ["return x", "def f(x):\n    return x + 1", "x"]
    together = _embedded(model, tokenizer, texts, 3)
    alone = torch.cat([_embedded(model, tokenizer, [text], 1) for text in texts])
    assert is_close(together, alone, SAME) and (alone[0] - alone[1]).abs().max() > 1e-2


def test_dealt_weights_are_the_same_of_other_words():
    weights = TextWeights({"if": 1.0, "for": 2.0}, {f"{i}": float(i) for i in range(30)})
    dealt = _dealt(weights, RunContext(Trainable(), (Arm("full"),)), "k")
    assert sorted(dealt.words.values()) == sorted(weights.words.values()) and dealt.words != weights.words


def test_other_strategies_are_refused(small):
    made = RunContext(Trainable(), (Arm("full"), Arm("mra", "mra")), data={"texts": files()})
    assert "shortens no texts" in CodeSearch(**SIZES).unsupported_reason(made)
