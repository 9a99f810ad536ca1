# SPDX-License-Identifier: Apache-2.0
"""Attention that tokens receive, against eager maps; what is learned of it; texts shortened in a line."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import manyheads
from manyheads import UserError
from manyheads.shortening import attention_received, learn, shorten
from tiny.tokenizers import BOTH, CODE
from tolerance import SAME, is_close

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 60, "initializer_range": 0.3,
}  # fmt: skip
TEXTS = [CODE[0], CODE[1]]


def build(name):
    torch.manual_seed(0)
    if name == "words":
        return BertModel(BertConfig(vocab_size=300, **SIZES), add_pooling_layer=False).double().eval()
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, num_key_value_heads=2, **SIZES)).double().eval()


def dense(model, tokenizer, text, layer):
    """The same from whole maps of eager attention, token by token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    causal = isinstance(model, LlamaForCausalLM)
    row = [tokenizer.bos_token_id, *ids] if causal else [2, *ids[:58], 3]
    row = row[:60]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        a = model(input_ids=torch.tensor([row]), output_attentions=True).attentions[layer][0].mean(0).numpy()
    model.set_attn_implementation("sdpa")
    n, found = len(row), []
    for s in range(1, n if causal else n - 1):
        rows = [t for t in range(s + 1 if causal else 0, n) if t != s]
        even = sum(1 / (t + 1 if causal else n) for t in rows)
        found.append(sum(a[t, s] for t in rows) / even if rows else np.nan)
    return found


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("name", BOTH)
def test_received_is_that_of_whole_maps(name, layer):
    model, tokenizer = build(name), BOTH[name]()
    got = attention_received(model, tokenizer, TEXTS, None if layer is None else (layer,))
    for text, row in zip(TEXTS, got, strict=True):
        want = dense(model, tokenizer, text, -1 if layer is None else layer)
        known = np.isfinite(want)
        assert (np.isfinite(row) == known).all()
        assert is_close(torch.tensor(np.asarray(row)[known]), torch.tensor(np.asarray(want)[known]), SAME)
        assert np.nanmax(np.abs(np.asarray(row) - dense(model, tokenizer, text, 0))) > 1e-3  # control: another layer


def test_long_texts_have_values_at_their_beginning():
    model, tokenizer = build("words"), BOTH["words"]()
    text = "\n".join(CODE[:3])
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    (row,) = attention_received(model, tokenizer, [text])
    assert count > 58 == len(row) and np.isfinite(row).all()
    assert learn("dietcode", model, tokenizer, [text]).words


@pytest.mark.parametrize("name", BOTH)
def test_in_a_line(name):
    model, tokenizer = build(name), BOTH[name]()
    made = manyheads.shorten(TEXTS, "dietcode:budget=0.5", tokenizer, model=model)
    weights = learn("dietcode", model, tokenizer, TEXTS)
    assert made == shorten(TEXTS, "dietcode:budget=0.5", tokenizer, weights=weights)
    mean = np.mean([value for program in made for value in program.weights])
    assert 0.3 < mean < 3 and {"method", "for", "return"} <= set(weights.statements)
    for one, text in zip(made, TEXTS, strict=True):
        assert 0 < len(one.text) < len(text)
    assert len(shorten(TEXTS, "slimcode", tokenizer)) == 2


def test_refused():
    with pytest.raises(UserError, match="shortens no texts"):
        shorten(TEXTS, "snapkv", BOTH["words"]())
    with pytest.raises(UserError, match="none is given"):
        learn("dietcode", build("words"), BOTH["words"](), [])
