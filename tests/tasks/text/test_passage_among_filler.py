# SPDX-License-Identifier: Apache-2.0
"""Passages among filler: where they stand, what is paired with what, and that a temperature acts on long texts only."""

import pytest
import torch
from transformers import BertConfig, BertModel

from manyheads import parse, use
from manyheads.data.texts import Text
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.tasks.text._reader import embedded
from manyheads.tasks.text.passage_among_filler import PassageAmongFiller
from tolerance import is_far, nearly

PLAIN, ALIGNED = Arm("reader", options={"reader": True}), Arm("aligned", options={"reader": True, "align": "entropy"})
OTHER = Arm("softmax", "softmax")
TASK = PassageAmongFiller(trained=12, length=24, passage=6, samples=5)


class Words:
    cls_token_id, sep_token_id = 1, 2

    def encode(self, text, **_):
        return [3 + int(word) for word in text.split()]


@pytest.fixture
def run():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=900, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    made = RunContext(Trainable(), (PLAIN, ALIGNED, OTHER))
    made.data = {"texts": [Text(f"{i}", " ".join(str(40 * i + j) for j in range(40))) for i in range(20)]}
    made.kept(("reader", TASK.model), lambda: (BertModel(config).eval(), Words()))
    return made


def test_a_passage_stands_once_in_another_text(run):
    passages, texts, others = TASK._texts(run)
    assert passages.shape == (5, 8) and texts.shape == (5, 24) and others.shape == (6, 24)
    seen = set()
    for passage, text in zip(passages[:, 1:-1].tolist(), texts[:, 1:-1].tolist(), strict=True):
        at = text.index(passage[0])
        assert text[at : at + 6] == passage
        sources = {(token - 3) // 40 for token in text[:at] + text[at + 6 :]}
        assert len(sources) == 1 and (passage[0] - 3) // 40 not in sources
        seen |= sources | {(passage[0] - 3) // 40}
    assert len(seen) == 10  # no text serves twice
    assert not seen & {(int(token) - 3) // 40 for token in others[:, 1:-1].flatten()}  # calibrated on others


def test_only_readers_are_measured_and_ranks_are_those_of_the_cosine(run):
    assert [unit.name for unit in TASK.units(run)] == ["reader", "aligned"]
    plain, aligned = (list(TASK.measure(run, unit)) for unit in TASK.units(run))
    model, (passages, texts, _) = run.kept(("reader", TASK.model), None)[0], TASK._texts(run)
    likeness = embedded(model, passages) @ embedded(model, texts).T
    wanted = [1 / (1 + int((row > row[i]).sum())) for i, row in enumerate(likeness)]
    assert [row.value for row in plain] == nearly(wanted, torch.float32)
    assert {row.metric for row in aligned} == {"reciprocal_rank", "temperature"}


def test_the_temperature_acts_on_texts_longer_than_trained_and_is_gone_after(run):
    model, (passages, texts, _) = run.kept(("reader", TASK.model), None)[0], TASK._texts(run)
    before = embedded(model, texts)
    rows = list(TASK.measure(run, TASK.units(run)[1]))
    tau = next(row.value for row in rows if row.metric == "temperature")
    assert 0.05 < tau < 1  # twice as many keys: sharper
    assert torch.equal(embedded(model, texts), before)
    with use(model, parse(f"t5_attention_alignment:trained=12,tau={tau}")):
        assert is_far(embedded(model, texts), before)
        short = embedded(model, passages)
    assert torch.equal(short, embedded(model, passages))


def test_too_few_texts_are_a_reason_not_to_measure(run):
    run.data = {"texts": run.data["texts"][:9]}
    assert "16 texts" in TASK.unsupported_reason(run)
