# SPDX-License-Identifier: Apache-2.0
"""A bias on logits equals the formula, on real models, in decoding, and where it is hidden altogether."""

import math

import pytest
import torch

import manyheads
from manyheads.calls.weights import weights
from manyheads.errors import UserError
from oracles import models
from tolerance import CLOSE, SAME, assert_close, error


class Weights(manyheads.strategy.AttentionWatch):
    def watch(self, call, out):
        call.state.setdefault("rows", []).append(torch.cat([rows for _, rows in weights(call)], 2))


def maps(model, spec, **inputs):
    watch = Weights()
    with manyheads.use(model, *([spec] if spec else []), watch) as port, torch.no_grad():
        logits = model(**inputs).logits
    return [memory["rows"][0] for memory in port.state(watch).values()], logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
def test_weights_of_the_first_layer(name):
    model, inputs = models.tiny(name), models.inputs(name)
    attn = "eager" if name == "gemma2" else None
    model = model if attn is None else models.build(name, attn=attn)
    plain, before = maps(model, None, **inputs)
    biased, after = maps(model, "logit_bias:columns=6-8+10,rows=9-18,amount=1.5,layers=0", **inputs)
    odds = torch.ones(19)
    odds[[6, 7, 8, 10]] = math.exp(1.5)
    want = plain[0].clone()
    want[:, :, 9:] = plain[0][:, :, 9:] * odds
    want[:, :, 9:] /= want[:, :, 9:].sum(-1, keepdim=True)
    rows = inputs["attention_mask"].bool()[:, None].expand(want.shape[:3])
    assert_close(biased[0][rows], want[rows], CLOSE)
    assert error(after, before) > 1e-3
    assert_close(maps(model, "logit_bias:amount=3", **inputs)[1][rows[:, 0]], before[rows[:, 0]], SAME)  # all alike
    assert torch.equal(maps(model, "logit_bias:amount=0,columns=3", **inputs)[0][0][rows] > 0, plain[0][rows] > 0)


def test_heads_and_hiding():
    model, ids = models.tiny("llama"), models.tokens(2, 12)
    plain, _ = maps(model, None, input_ids=ids)
    biased, _ = maps(model, "logit_bias:heads=0.2,columns=4,amount=-1e9", input_ids=ids)
    assert_close(biased[0][:, [0, 1, 3]], plain[0][:, [0, 1, 3]], SAME)
    assert (biased[0][:, 2, 5:, 4] == 0).all() and (plain[0][:, 2, 5:, 4] > 0).all()


def test_decoding_equals_one_forward():
    model, ids = models.tiny("llama"), models.tokens(2, 12)
    spec = "logit_bias:columns=1-3+9,rows=6-11,amount=2"
    with manyheads.use(model, spec), torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :8], use_cache=True)
        pieces = [out.logits]
        for t in range(8, 12):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole, SAME)
    with torch.no_grad():
        assert error(model(ids).logits, whole) > 1e-3


def test_it_carries_gradients():
    model, ids = models.build("llama"), models.tokens(2, 8)
    model.model.embed_tokens.weight.requires_grad_(True)
    with manyheads.use(model, "logit_bias:columns=2,amount=1"):
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_head_that_is_not_there_is_refused():
    model, ids = models.tiny("llama"), models.tokens(1, 5)
    with pytest.raises(UserError, match="heads 0 to 3, not 9"), manyheads.use(model, "logit_bias:amount=1,heads=0.9"):
        model(ids)
    with manyheads.use(model, "logit_bias:amount=1,heads=0.3"):  # control: the last one is there
        model(ids)
