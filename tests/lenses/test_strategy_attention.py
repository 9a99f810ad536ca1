# SPDX-License-Identifier: Apache-2.0
"""SRA and lift equal those of dense maps; their closed forms; where history goes; dialogues compared in pairs."""

import numpy as np
import pytest
import torch

import manyheads
from manyheads.calls.weights import measure
from manyheads.errors import UserError
from manyheads.heads import HeadTable
from manyheads.lens import AttentionView, TokenSpans
from manyheads.lenses.strategy_attention import (
    StrategyAttention,
    layout,
    paired_difference,
    per_turn,
    span_of,
    sra,
)
from oracles import dense, models
from tolerance import CLOSE, FORMULA, SAME, assert_close, error, is_close, is_far, nearly

START, STOP, LENGTH = 6, 9, 20  # of the instruction; the reply begins at 13


def roles(first=13, **more):
    return TokenSpans({"system": [[(START, STOP)]], "response": [[(first, LENGTH)]], **more})


def look(name, lens="strategy_attention", attn=None, given=None, **inputs):
    model = models.tiny(name) if attn is None else models.build(name, attn=attn)
    with manyheads.watch(model, lens, roles=given or roles()) as seen, torch.no_grad():
        model(**inputs)
    return seen.compute()


def formula(maps, keys, first=13, start=START, stop=STOP):
    """SRA and lift ``[N, L, H]`` of dense maps ``[B, H, T, S]``, with the tokens that a weight can be on counted."""
    span = keys & (torch.arange(keys.shape[1]) >= start) & (torch.arange(keys.shape[1]) < stop)
    weights, lifts = [], []
    for a in maps:
        rows = a[:, :, first:]
        weight = (rows * span[:, None, None]).sum(-1) / span.sum(1)[:, None, None]
        weights.append(weight.mean(-1))
        lifts.append((weight * (rows > 0).sum(-1)).mean(-1))
    return torch.stack(weights, 1), torch.stack(lifts, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "bert"])
def test_equals_dense_maps(name):
    """The second row is padded on the left into its instruction; sliding windows count what they let be seen."""
    ids = models.tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    maps = dense.maps(dense.eager(name), input_ids=ids, attention_mask=mask)["self"]
    for attn in ("eager", None) if name not in ("gemma2", "gpt_oss") else ("eager",):
        found = look(name, attn=attn, input_ids=ids, attention_mask=mask)
        for key, want in zip(("sra", "lift"), formula(maps, mask.bool()), strict=True):
            assert_close(torch.tensor(found.tables[key].values).float(), want, SAME)
            assert error(torch.tensor(found.tables[key].values).float(), want * 1.001) > SAME
        wrong = formula(maps, torch.ones_like(mask).bool())[0]  # the padded part of the instruction counted
        assert error(torch.tensor(found.tables["sra"].values).float(), wrong) > 1e-2
        series = np.stack(found.series["sra"])
        assert np.isnan(series[:, :13]).all() and is_close(series[:, 13:].mean(1), sra(found.tables["sra"]), CLOSE)
    assert "Instruction heads" in found.notes[1]


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_and_decoder(name):
    """``at=cross`` takes the instruction from the source; ``at=self`` looks at the decoder alone."""
    inputs = models.inputs(name)
    inputs["decoder_input_ids"] = models.tokens(2, 11, seed=1)
    inputs.pop("attention_mask", None)
    maps = dense.maps(dense.eager(name), **inputs)
    given = TokenSpans({"system": [[(1, 3)]], "response": [[(5, 11)]]}, {"system": [[(2, 6)]]})
    found = look(name, "strategy_attention:at=cross", given=given, **inputs)
    keys = torch.ones(2, maps["cross"][0].shape[3], dtype=torch.bool)
    assert_close(torch.tensor(found.tables["sra"].values).float(), formula(maps["cross"], keys, 5, 2, 6)[0], SAME)
    found = look(name, given=given, **inputs)
    want = formula(maps["self"], torch.ones(2, 11, dtype=torch.bool), 5, 1, 3)
    assert_close(torch.tensor(found.tables["lift"].values).float(), want[1], SAME)
    with pytest.raises(UserError, match="source="):
        look(name, "strategy_attention:at=cross", **inputs)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_generation_equals_one_forward(name):
    """The rows of decoded tokens are those of a forward over the whole; sliding windows lose the instruction."""
    inputs, model = models.inputs(name), models.tiny(name)
    length = inputs["input_ids"].shape[1]
    given = TokenSpans({"system": [[(length - 4, length - 1)]], "response": [[(length, length + 12)]]})
    with manyheads.watch(model, "strategy_attention", roles=given) as seen:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)[:, :-1]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = look(name, given=given, input_ids=ids[:, :-1], attention_mask=mask, position_ids=places)
    for key in ("sra", "lift"):
        assert is_close(seen.compute().tables[key].values, whole.tables[key].values, CLOSE)
        a, b = np.stack(seen.compute().series[key]), np.stack(whole.series[key])
        assert is_close(a, b, CLOSE) and np.isfinite(a[:, length:]).all()
    if name == "gemma3_text":
        assert (whole.tables["sra"].values > 0).all()
        late = TokenSpans({"system": [[(0, 2)]], "response": [[(length + 10, length + 11)]]})
        assert (look(name, given=late, input_ids=ids[:1, :-1]).tables["sra"].values[0, 0] == 0).all()


def test_a_batch_is_its_rows_and_looking_changes_no_bit():
    model, ids = models.tiny("llama"), models.tokens(3, LENGTH)
    with torch.no_grad():
        plain = model(ids).logits
    with manyheads.watch(model, "strategy_attention", roles=roles()) as seen, torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
        for row in ids:
            model(row[None])
    values = seen.compute().tables["lift"].values
    assert is_close(values[:3], values[3:]) and is_far(values[0], values[1], SAME)


def closed(weights, span=(2, 5), response=(10, 16), lens=None):
    """LensResult on weights that are given: ``[H, T, T]``, as if a model had made them."""
    lens = lens or StrategyAttention()
    heads, length, _ = weights.shape
    site = manyheads.Site("x", 0, 0, "self", True)
    q = torch.eye(length, dtype=torch.float64).expand(1, heads, -1, -1)
    k = weights.double().clamp(min=1e-300).log().transpose(-1, -2)[None]  # q k^T = log A
    call = manyheads.AttentionCall(site, q, k, k, scale=1.0, is_causal=True)
    known = torch.ones(1, length, dtype=torch.bool)
    given = TokenSpans({"system": [[span]], "response": [[response]]})
    view = AttentionView(call, q, {}, given, known, known, 0, True)
    asked = lens.statistics(view)
    lens.update(view, dict(zip(asked, measure(call, list(asked.values())), strict=True)))
    return lens.compute([(site, view.memory)])


def causal(scores):
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def test_closed_forms():
    length = torch.arange(1, 17, dtype=torch.float64)
    found = closed(causal(torch.zeros(2, 16, 16).double()))
    assert_close(torch.tensor(found.tables["sra"].values[0, 0, 0]), (1 / length[10:]).mean(), FORMULA)
    assert_close(torch.tensor(found.tables["lift"].values), torch.ones(1, 1, 2).double(), FORMULA)
    later = closed(causal(torch.zeros(2, 64, 64).double()), response=(58, 64))  # SRA falls with length, lift does not
    assert later.tables["sra"].mean[0, 0] < found.tables["sra"].mean[0, 0] / 3
    assert later.tables["lift"].mean[0, 0] == nearly(1)
    all_on = torch.zeros(1, 16, 16).double()
    all_on[:, :, 2] = 1
    assert closed(all_on).tables["sra"].mean[0, 0] == nearly(1 / 3)  # not 1 / 2, as printed
    random = causal(torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)).double())
    a, b, both = (sra(closed(random, span).tables["sra"])[0] for span in ((2, 5), (5, 6), (2, 6)))
    assert (3 * a + b) / 4 == nearly(both) and a != nearly(b)
    turned = closed(random[[2, 0, 3, 1]], (2, 5))
    assert sra(turned.tables["sra"])[0] == nearly(a)
    assert turned.tables["sra"].mean[0, 0] == nearly(closed(random, (2, 5)).tables["sra"].mean[0, 2])
    nothing = closed(random, (2, 2))
    assert np.isnan(nothing.tables["sra"].values).all() and "No token" in nothing.notes[0]
    assert np.isnan(closed(random, response=(3, 3)).tables["lift"].values).all()
    curve = per_turn(closed(random).series["sra"][0], [(10, 13), (13, 16), (0, 5)])
    assert curve[:2].mean() == nearly(a) and np.isnan(curve[2])


def test_roles_have_to_be_given():
    ids = models.tokens(1, LENGTH)
    for given in (TokenSpans(), TokenSpans({"response": [[(3, 9)]]})):
        with pytest.raises(
            UserError, match=r"role 'system', and none are given: watch with roles=TokenSpans\(\{'system'"
        ):
            look("llama", given=given, input_ids=ids)
    with pytest.raises(UserError, match="role 'reply'"):
        look("llama", "strategy_attention:rows=reply", input_ids=ids)
    other = look("llama", "strategy_attention:span=fact", given=roles(fact=[[(1, 2)]]), input_ids=ids)
    assert other.tables["sra"].about["span"] == "fact"
    behind = look("llama", given=TokenSpans({"system": [[(START, STOP)]]}), input_ids=ids)  # the reply is all behind it
    assert np.isfinite(behind.series["sra"][0]).sum() == LENGTH - STOP
    assert np.isfinite(look("llama", "strategy_attention:span=bos", input_ids=ids).tables["sra"].values).all()


def test_layouts():
    turns = [{"role": role, "content": f"{role[0]}{i}"} for i in range(3) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "Be kind."}, *turns[:5]]
    plain = layout(messages, "Ask.")
    assert [m["role"] for m in plain] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert plain[0]["content"] == "Be kind.\n\nAsk." and plain[1:] == messages[1:]
    first, last = layout(messages, "Ask.", "c1_hf"), layout(messages, "Ask.", "c1_hl")
    told = "user: u0\nassistant: a0\nuser: u1\nassistant: a1"
    assert first == [{"role": "system", "content": f"{told}\n\nBe kind.\n\nAsk."}, messages[-1]]
    assert last == [{"role": "system", "content": f"Be kind.\n\nAsk.\n\n{told}"}, messages[-1]]
    assert layout(messages, "Ask.", "c3_hf")[1:] == messages[-3:]
    assert layout(messages, "Ask.", "c5_hl") == plain  # nothing is left to be told
    with pytest.raises(UserError, match="no layout"):
        layout(messages, "Ask.", "c0_hf")
    text = "Be kind. Ask. Then"
    offsets = [(0, 0), (0, 2), (2, 7), (7, 8), (8, 12), (12, 13), (13, 18)]
    assert span_of(text, "Ask.", offsets) == (4, 6)
    with pytest.raises(UserError, match="in no token"):
        span_of(text, "Tell.", offsets)


def test_pairs_of_dialogues():
    """The interval is of the differences: narrow where dialogues differ much and templates by a constant."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=40) * 10
    mean, low, high = paired_difference(a + 1 + rng.normal(size=40) * 0.1, a)
    assert 0.9 < low < mean < high < 1.1
    shuffled = paired_difference(a + 1, rng.permutation(a))
    assert shuffled[2] - shuffled[1] > 4
    with pytest.raises(UserError, match="paired"):
        paired_difference(a, a[:3])
    assert sra(HeadTable("x", ("a",), np.array([[[1.0, np.nan]], [[3.0, 5.0]]]))).tolist() == [1, 4]
