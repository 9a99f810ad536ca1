# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what was planted, and says nothing of what is not there."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from manyheads.inspect.attention_breakdown import FIRST
from manyheads.inspect.checks import evaluate
from manyheads.inspect.doctor import diagnose, duplicate_heads, padding
from manyheads.inspect.prompts import Prompt
from tolerance import is_close, nearly


def check(found, key):
    return next(s for s in found.checks if s.key == key)


def look(model, tokenizer, texts):
    return diagnose(model, tokenizer, texts, length=64, samples=2, quick=True)


def test_a_healthy_model(found):
    assert {s.key for s in found.checks} == {
        "numbers", "padding", "sinks", "activations", "float16", "channels", "idle", "duplicates", "contexts",
    }  # fmt: skip
    for key in ("numbers", "padding", "sinks", "float16"):
        assert check(found, key).level == "fine", check(found, key)
    order = [s.level for s in found.checks]
    assert order == sorted(order, key=("watch", "note", "unknown", "fine").index)
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["checks"][0]["title"] and document["loss"] == nearly(found.loss)


def test_dead_and_doubled_heads(model, tokenizer, texts):
    """One head's output projection is zero; another pair has the same queries and keys."""
    sick = copy.deepcopy(model)
    layer, width = sick.model.layers[1].self_attn, 8
    with torch.no_grad():
        layer.o_proj.weight[:, 2 * width : 3 * width] = 0
        sick.model.layers[0].self_attn.q_proj.weight[width : 2 * width] = sick.model.layers[0].self_attn.q_proj.weight[
            :width
        ]
    found = look(sick, tokenizer, texts)
    assert check(found, "idle").values["silent"] == ["1.2"] and check(found, "idle").level == "watch"
    assert "1.2" in check(found, "idle").values["not missed"]
    assert found.measures.alone.mean[1, 2] == pytest.approx(0, abs=1e-6)
    assert {"0.0", "0.1"} <= set(check(found, "duplicates").values["alike"])
    assert found.measures.most_similar[0, 0] == 1 and found.measures.head_distance[0, 0] == pytest.approx(0, abs=1e-6)
    assert "share the keys" in check(found, "duplicates").message


def test_sinks_huge_numbers_and_nan(model, tokenizer, texts):
    sick = copy.deepcopy(model)
    with torch.no_grad():
        sick.model.layers[0].mlp.down_proj.weight *= 0
        sick.model.layers[0].mlp.down_proj.weight[3] = 3e4
    found = look(sick, tokenizer, texts)
    assert check(found, "float16").level == "watch" and check(found, "activations").level in ("watch", "note")
    with torch.no_grad():
        sick.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    found = look(sick, tokenizer, texts)
    assert check(found, "numbers").level == "watch" and "model.layers.1.mlp" in check(found, "numbers").message
    assert found.checks[0].level == "watch"
    json.dumps(found.document(), allow_nan=False)


def test_sinks_are_counted(found):
    made = copy.deepcopy(found.measures)
    table = made.found["active_dormant"].tables["sink"]
    table.values[:] = 0.1
    table.values[:, 0, :2] = 0.9
    said = next(s for s in evaluate(made) if s.key == "sinks")
    assert said.level == "watch" and said.values["heads"] == ["0.0", "0.1"] and "streaming_llm" in said.advice
    table.values[:, 0, 1] = 0.1
    assert next(s for s in evaluate(made) if s.key == "sinks").level == "note"


def test_padding_leaks(model, tokenizer):
    """Learned positions: left padding without position ids leaks; a model that ignores its mask leaks anyhow."""
    ids = list(range(5, 95))
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=128, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        gpt2.transformer.wpe.weight *= 20
    made = padding(gpt2, tokenizer, Prompt(ids, "x"))
    assert made["left"]["change"] < 1e-3 and made["right"]["change"] < 1e-3
    assert made["left, no position ids"]["change"] > 0.1

    class Deaf(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
            return model(input_ids=input_ids, position_ids=position_ids, use_cache=False)

        def parameters(self, recurse=True):
            return model.parameters()

    deaf = padding(Deaf(), tokenizer, Prompt(ids, "x"))
    assert deaf["left, no position ids"]["change"] > 1e-2 and deaf["right"]["change"] < 1e-3
    rope = padding(model, tokenizer, Prompt(ids, "x"))
    assert all(case["change"] < 1e-3 for case in rope.values())


def test_contexts_that_hurt(found):
    made = copy.deepcopy(found.measures)
    made.contexts, made.max_context = ([256, 512, 1024], np.array([[2.0, 2.1], [1.8, 1.9], [2.5, 2.6]])), 4096
    said = next(s for s in evaluate(made) if s.key == "contexts")
    assert said.level == "watch" and said.values["best"] == 512
    made.max_context = 512
    assert next(s for s in evaluate(made) if s.key == "contexts").level == "note"
    made.contexts = ([256, 512], np.array([[2.0, 2.1], [1.8, 1.9]]))
    assert next(s for s in evaluate(made) if s.key == "contexts").level == "fine"


def test_duplicate_heads_of_known_maps(found):
    own = copy.deepcopy(found.measures.found["attention"])
    size = own.maps[0, 0].shape[0]
    eye, first = np.eye(size), np.zeros((size, size))
    first[:, 0] = 1
    for head, made in enumerate((eye, first, eye * 0.5, 0.9 * eye + 0.1 * first)):
        own.maps[0, head] = made
    distance, most_similar = duplicate_heads(own)
    assert distance[0, 0] == 0 and most_similar[0, 0] == 2 and most_similar[0, 3] in (0, 2)
    assert distance[0, 3] == nearly(0.1 * (size - 1) / size) and distance[0, 1] > 0.8
    assert own.tables[FIRST].values.shape[2] == 4


def test_it_says_of_which_layer(model, tokenizer, texts):
    """A quick look ablates a few heads alone: the layers that they are of are named, and not where all are tried."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 8})
    deep = transformers.LlamaForCausalLM(config).eval()
    quick = check(look(deep, tokenizer, texts), "idle")
    layers = sorted({int(head.partition(".")[0]) for head in quick.values["not missed"]})
    assert quick.values["tried"] == 8 < 32 and " not missed, of layer" in quick.figure
    assert quick.figure.endswith(" only") and all(str(layer) in quick.figure for layer in layers)
    whole = check(look(model, tokenizer, texts), "idle")
    assert whole.values["tried"] == 8 and "of layer" not in whole.figure


def test_offloaded_models(texts, tokenizer):
    """Weights that stand on `meta` between their uses: the same figures, and a word that they were not read."""
    import accelerate

    from tiny.inspect import make_model

    model = make_model()
    want = look(model, tokenizer, texts)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    got = look(model, tokenizer, texts)
    for name, found in want.measures.found.items():
        for key, table in found.tables.items():
            assert is_close(got.measures.found[name].tables[key].values, table.values)
    assert "offloaded weights were not read" in check(got, "numbers").message
    assert "offloaded" not in check(want, "numbers").message
