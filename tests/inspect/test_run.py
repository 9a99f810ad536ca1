# SPDX-License-Identifier: Apache-2.0
"""What `inspect` keeps is what the lenses say of the same prompts; roles stand where the text has them."""

import json
import math

import numpy as np
import pytest
import torch

import manyheads
from manyheads.calls.weights import measure, weights
from manyheads.data.texts import Text
from manyheads.errors import UserError
from manyheads.inspect.attention_breakdown import FIRST, Parts
from manyheads.inspect.naming import parse_lenses, parse_role
from manyheads.inspect.prompts import Prompt, chat, draw
from manyheads.inspect.run import inspect_model
from tolerance import SAME, assert_close, error, is_close, is_far, nearly


def test_findings_are_those_of_watch(model, seen):
    """Looking through the verb gives the numbers of `manyheads.watch`, whatever else looks beside."""
    for spec in ("active_dormant", "strategy_attention"):
        with manyheads.watch(model, spec) as alone, torch.no_grad():
            for prompt in seen.prompts:
                alone.roles = prompt.parts
                model(torch.tensor([prompt.ids]))
        for name, made in alone.compute().tables.items():
            assert is_close(seen.found[spec].tables[name].values, made.values)
            assert seen.found[spec].tables[name].about["prompts"] == 2
    assert is_far(seen.found["active_dormant"].tables["sink"].values, 0)


def test_the_document_is_the_findings(seen):
    document = json.loads(json.dumps(seen.document(), allow_nan=False))
    for spec, found in seen.found.items():
        kept = document["findings"][spec]
        assert kept["notes"] == found.notes and set(kept["series"]) == set(found.series)
        for name, made in found.tables.items():
            again = manyheads.HeadTable.from_dict(kept["tables"][name])
            assert np.array_equal(again.values, made.values, equal_nan=True) and again.layers == made.layers
    assert document["prompts"][0]["ids"] == seen.prompts[0].ids
    assert document["run"]["settings"]["seed"] == 0 and document["run"]["environment"]["transformers"]
    assert document["losses"][0][0] is None and len(document["losses"][0]) == 96


def test_parts_add_up_and_equal_dense_maps():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 8, generator=generator) for h, t in ((4, 30), (2, 37), (2, 37)))
    call = manyheads.AttentionCall(manyheads.Site("x", 0, 0, "self", True), q, k, v, scale=0.3, is_causal=True)
    maps = torch.cat([rows for _, rows in weights(call, 100)], 2)
    columns = torch.zeros(2, 37, 2)
    columns[:, 0, 0] = 1
    columns[0, 5:9, 1] = 1
    back = torch.arange(30)[:, None] + 7 - torch.arange(37)
    free = maps * (1 - columns.sum(-1))[:, None, None]
    bins = [back == 0, back == 1, (back >= 2) & (back < 17), back >= 17]
    want = torch.stack([*(maps @ columns[:, None]).unbind(-1), *((free * b).sum(-1) for b in bins)], -1)
    for block in (1, 7, 100):
        got = measure(call, [Parts(columns)], block)[0]
        assert_close(got, want, SAME)
        assert_close(got.sum(-1), torch.ones(2, 4, 30), SAME)
    assert error(want[..., 3], (free * (back == 2)).sum(-1)) > 1e-3


def test_parts_of_a_probe_are_the_whole(seen):
    own = seen.found["attention"].tables
    assert seen.parts[:2] == (FIRST, "system")
    assert is_close(sum(own[part].mean for part in seen.parts), 1)
    assert len(seen.found["attention"].maps) == 8


def test_ablation_has_its_control(seen):
    name, curve = seen.curve
    assert name == "active_dormant/sink" and curve.counts[0] == 0
    assert curve.ranked[0] == nearly(curve.control[0, 0]) and curve.control.shape == (3, len(curve.counts))
    assert curve.heads == seen.found["active_dormant"].tables["sink"].names(
        seen.found["active_dormant"].tables["sink"].top(curve.counts[-1])
    )
    assert curve.ranked[-1] != curve.ranked[0]


def test_losses_are_the_models(model, seen):
    ids = torch.tensor([seen.prompts[0].ids])
    with torch.no_grad():
        want = float(model(ids, labels=ids).loss)
    assert np.nanmean(seen.losses[0]) == pytest.approx(want, abs=1e-5) and math.isnan(seen.losses[0][0])


def test_roles_from_offsets(tokenizer):
    text = Text("a", "You are kind. " + "The rain fell on the roof of the house. " * 20)
    roles = parse_role("who=rain fell on") | parse_role("head=0-3")
    (prompt,) = draw([text], tokenizer, 60, 3, 0, roles)
    ((start, stop),) = prompt.roles["who"]
    assert tokenizer.decode(prompt.ids[start:stop]).strip() == "rain fell on" and prompt.roles["head"] == [(0, 3)]
    assert tokenizer.decode(prompt.ids[start - 1 : stop]).strip() != "rain fell on"
    for bad, word in (("who=sunshine", "no text holds"), ("who=0-99", "raise --length"), ("who=9-4", "no token")):
        with pytest.raises(UserError, match=word):
            draw([text], tokenizer, 60, 3, 0, parse_role(bad))


def test_roles_of_a_chat(tokenizer):
    messages = [
        {"role": "system", "content": "  Answer briefly.  "},
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A sequence."},
        {"role": "user", "content": "And a set?"},
        {"role": "assistant", "content": "No order."},
    ]

    def said(prompt, role):
        return [tokenizer.decode(prompt.ids[a:b]).strip() for a, b in prompt.roles[role]]

    prompt = chat(messages, tokenizer, generate=False)
    assert said(prompt, "system") == ["Answer briefly."] and said(prompt, "response") == ["No order."]
    assert said(prompt, "user") == ["What is a list?", "And a set?"] and said(prompt, "assistant") == ["A sequence."]
    asked = chat(messages[:4], tokenizer, generate=True)
    assert "response" not in asked.roles and tokenizer.decode(asked.ids).endswith("<|assistant|>")
    assert asked.answered([5, 6]).roles["response"] == [(len(asked.ids), len(asked.ids) + 2)]
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        chat(messages, plain, generate=False)
    plain.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="leaves out message 2"):
        chat(messages, plain, generate=False)


def test_an_answer_becomes_the_response(model, tokenizer):
    prompt = chat([{"role": "user", "content": "Say something nice about lists."}], tokenizer, generate=True)
    seen = inspect_model(model, tokenizer, lenses=["spans:span=user"], prompts=[prompt], generate=5)
    ((start, stop),) = seen.prompts[0].roles["response"]
    assert start == len(prompt.ids) and 0 < stop - start <= 5
    series = seen.found["strategy_attention:span=user"].series["sra"][0]
    assert np.isfinite(series[start:]).all() and np.isnan(series[:start]).all()


def test_layers_are_those_asked_for(model, tokenizer, texts):
    seen = inspect_model(model, tokenizer, texts, ["sinks"], length=40, samples=1, layers=[1])
    (spec,) = set(seen.found) - {"attention"}
    assert seen.found[spec].tables["sink"].layers == (1,)
    with pytest.raises(UserError, match="layers 0 to 1"):
        inspect_model(model, tokenizer, texts, ["sinks"], length=40, layers=[5])


def test_names_of_lenses():
    lenses, roles = parse_lenses(["sinks:threshold=0.4,spans:system=0-12,user=14-20", "massive"])
    assert [lens.spec for lens in lenses] == [
        "active_dormant:threshold=0.4", "strategy_attention", "strategy_attention:span=user", "massive_values",
        "refined_massive_activations",
    ]  # fmt: skip
    assert roles == {"system": [(0, 12)], "user": [(14, 20)]}
    assert parse_lenses(["massive_values(threshold=3)"])[0][0].threshold == 3
    assert parse_role('a="0-3"') == {"a": "0-3"}


def test_without_roles_windows_come_from_anywhere(tokenizer, texts):
    prompts = draw(texts, tokenizer, 64, 5, 0)
    assert [len(p.ids) for p in prompts] == [64] * 5 and all(not p.roles for p in prompts)
    assert draw(texts, tokenizer, 64, 5, 0) == prompts != draw(texts, tokenizer, 64, 5, 1)
    short = [Text("s", "a few words of a prompt that is not long at all")]
    assert SHORT < len(draw(short, tokenizer, None, 3, 0)[0].ids) < 64
    with pytest.raises(UserError, match="shorter --length"):
        draw(short, tokenizer, 64, 3, 0)
    with pytest.raises(UserError, match="too short"):
        draw([Text("s", "a b")], tokenizer, None, 3, 0)
    assert Prompt([1], "x").parts.spans == {}


SHORT = 8
