# SPDX-License-Identifier: Apache-2.0
"""Figures of normalization_measures, recomputed for one text from the model's own maps."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from manyheads.data.texts import Text, standard_library
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses.normalization_measures import SHARE, NormalizationMeasures
from oracles.tasks import context, rows, values

SPEC = "attention_normalization_limits:normalizer="
ARMS = (Arm("softmax", SPEC + "softmax"), Arm("sparse", SPEC + "sparsemax"))
TASK = NormalizationMeasures(tokens=64, windows_of=2, fewest=32, every_row=True)


@pytest.fixture(scope="module")
def run():
    subject = CausalLM("default")
    subject.load("cpu")
    made = context(*ARMS, subject=subject)
    made.data = {"texts": standard_library()[:24]}
    return made


def test_rows_are_means_over_heads(run):
    found = rows(TASK, run)
    model, ids = run.subject.model, TASK.windows(run)[:, :-1]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True).attentions, 1).double()  # [B, L, H, T, T]
    model.set_attn_implementation("sdpa")
    a = maps.square().sum(-1)
    norms = (a - 2 * maps.pow(3).sum(-1) + a.square()).clamp(min=0).sqrt()
    for keys, n in (("fewest", 32), ("most", 64)):
        outside = 1 - maps[..., n - 1, :].topk(n // 16).values.sum(-1)
        assert values(found, "bound", "softmax", selected=SHARE, keys=keys) == pytest.approx(
            outside.mean((1, 2)).tolist(), rel=1e-3
        )
        assert values(found, "sensitivity", "softmax", temperature="1", keys=keys) == pytest.approx(
            norms[..., n - 1].mean((1, 2)).tolist(), rel=1e-3
        )
    every = values(found, "sensitivity_of_every_row", "softmax")
    assert every == pytest.approx(norms.mean((1, 2, 3)).tolist(), rel=1e-3)
    assert all(0.1 < x <= 1.001 for x in values(found, "tightest", "softmax"))
    sparse = [values(found, "distance", name, selected=SHARE, keys="most") for name in ("softmax", "sparse")]
    assert all(np.array(sparse[1]) < np.array(sparse[0]))
    assert {row.at["keys"] for row in found if row.arm == "sparse"} == {"most"}


def test_refusals(run):
    assert "reads" in NormalizationMeasures(tokens=10**6).unsupported_reason(run)
    missing = NormalizationMeasures(encoder="all-minilm-l6-v2", tokens=10**6, text="brown", label="encoder")
    assert missing.label == missing.key == "encoder" and missing.unsupported_reason(run)


class Words:
    cls_token_id, sep_token_id = 1, 2

    def encode(self, text, **_):
        return [3 + int(word) for word in text.split()]


def test_an_encoder_reads_the_beginning_of_a_text_at_each_length():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model, made = BertModel(config).eval(), context(*ARMS)
    model.set_attn_implementation("eager")  # returns its maps
    made.data = {"texts": [Text(f"{i}", " ".join(str((7 * i + j) % 90) for j in range(70))) for i in range(3)]}
    made.kept(("reader", "tiny"), lambda: (model, Words()))
    task = NormalizationMeasures(encoder="tiny", label="encoder", tokens=64, windows_of=2, fewest=16)
    found = rows(task, made)
    ids = task._texts(made)
    assert [x.shape[1] for x in ids[0]] == [16, 32, 64] and ids[0][0][0, :-1].equal(ids[0][2][0, :15])
    grid = {n: [round(2 ** (i / 2)) - 1 for i in range(8, 13) if 2 ** (i / 2) <= n + 0.5] for n in (16, 32, 64)}
    for keys, text in zip(("fewest", "32", "most"), range(3), strict=True):
        with torch.no_grad():
            maps = torch.stack(model(ids[0][text], output_attentions=True).attentions).double()
        n = maps.shape[-1]
        outside = 1 - maps[..., grid[n], :].topk(n // 4).values.sum(-1)
        got = values(found, "bound", "softmax", selected="L/4", keys=keys)[0]
        assert got == pytest.approx(float(outside.mean()), rel=1e-3)
