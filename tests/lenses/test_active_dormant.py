# SPDX-License-Identifier: Apache-2.0
"""Sinks, drains and peaks equal those of dense maps; the oracles of each measure; ReLU attention and its gradients."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import manyheads
from manyheads.call import AttentionCall, Site
from manyheads.heads import HeadTable
from manyheads.integrations.transformers import find_sites
from manyheads.lens import TokenSpans
from manyheads.lenses.active_dormant import ActiveDormant, switch
from manyheads.lenses.active_dormant.relu_attention import ReLUAttention, relu_weights
from oracles import dense, models
from tolerance import CLOSE, FORMULA, SAME, assert_close, error, is_close, is_far

SITE = Site("x", 0, 0, "self", True, num_heads=4, num_kv_heads=2)


@dataclass(frozen=True, kw_only=True)
class Keep(manyheads.strategy.AttentionWatch):
    """Keep every call."""

    def watch(self, call, out):
        call.state["call"] = call


def look(model, *given, roles=None, **inputs):
    with manyheads.watch(model, *(given or ("active_dormant",)), roles=roles) as seen, torch.no_grad():
        model(**inputs)
    return seen.compute()


def alone(lens, *calls):
    """Findings of calls that come from no model."""
    memory = {}
    for call in calls:
        call = call.replace(state=memory)
        lens.watch(call, call.attend())
    return lens.compute([(SITE, memory)])


def call_of(q, k, v, **fields):
    return AttentionCall(SITE, q, k, v, scale=1.0, is_causal=True, **fields)


def drawn(length=7, keys=None):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, length), (2, keys or length), (2, keys or length))
    return [torch.randn(2, h, t, 8, generator=generator).double() for h, t in shapes]


def inputs_of(name):
    made = models.inputs(name)
    if name in models.SEQ2SEQ:
        made["decoder_input_ids"] = models.tokens(2, 11, seed=1)
    return made


def per_prompt(values, rows):
    """Mean over the chosen rows of each prompt, NaN elsewhere is skipped: ``[B, H, T] -> [B, H]``."""
    values = torch.where(rows[:, None] & values.isfinite(), values, torch.nan)
    return values.nanmean(-1).double().numpy()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "bert", "bart", "whisper"])
def test_tables_equal_dense_maps(name):
    """Left-padded; sinks and gaps from the maps that the model returns, drains from the values themselves."""
    model, inputs = dense.eager(name), inputs_of(name)
    maps = dense.maps(model, **inputs)
    found = look(model, **inputs)
    with manyheads.use(model, Keep()) as port, torch.no_grad():
        model(**inputs)
    used = dict.fromkeys(maps, 0)
    for row, site in enumerate(site for site, _ in find_sites(model)):
        kind = "cross" if site.kind == "cross" else "self" if site.causal or "encoder" not in maps else "encoder"
        a = maps[kind][used[kind]].double()
        used[kind] += 1
        call = next(memory["call"] for where, memory in port.kept(port.strategies[0]) if where.name == site.name)
        padded = inputs.get("attention_mask", torch.ones(2, a.shape[2])).bool()
        keys = padded if kind != "self" or name not in models.SEQ2SEQ else torch.ones(2, a.shape[3]).bool()
        if keys.shape[1] != a.shape[3]:  # whisper's frames
            keys = torch.ones(2, a.shape[3]).bool()
        first = keys & (keys.long().cumsum(1) == 1)
        rows = torch.ones(a.shape[0], a.shape[2]).bool() if kind == "cross" else keys & ~first
        sink = (a * first[:, None, None]).sum(-1)
        want = per_prompt(sink, rows)
        assert is_close(found.tables["sink"].values[:, row], want, CLOSE)
        wrong = per_prompt(sink, rows & (torch.arange(a.shape[2]) > 6) if kind == "cross" else keys)  # t = 0 is no row
        assert is_far(found.tables["sink"].values[:, row], wrong, SAME)
        others = torch.where((a > 0) & ~first[:, None, None], a.log(), torch.nan).nanmean(-1)
        gap = torch.where(sink > 0, sink.log(), torch.nan) - others
        assert is_close(found.tables["gap"].values[:, row], per_prompt(gap, rows), CLOSE)
        norms = call.v.norm(dim=-1).repeat_interleave(a.shape[1] // call.v.shape[1], 1).double()
        drain = per_prompt(norms, first) / per_prompt(norms, keys & ~first)
        assert is_close(found.tables["drain"].values[:, row], drain, CLOSE)
    assert all(used[kind] == len(maps[kind]) for kind in maps)
    if name == "gpt_oss":
        a = maps["self"][0].double()
        rows = padded & (padded.long().cumsum(1) > 1)
        assert is_close(found.tables["learned"].values[:, 0], per_prompt(1 - a.sum(-1), rows), CLOSE)
        assert found.tables["learned"].mean.min() > 0.01
        relu = look(model, "active_dormant:attention=relu", **inputs)  # rows need not sum to 1
        assert "learned" not in relu.tables
    else:
        assert "learned" not in found.tables


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_peaks_equal_hidden_states(name):
    model, inputs = (
        models.build(name),
        models.inputs(name),
    )  # transformers leaves hooks on a model it was asked these of
    found = look(model, **inputs)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    norms, mask = hidden.double().norm(dim=-1), inputs["attention_mask"].bool()
    first = mask & (mask.long().cumsum(1) == 1)
    want = per_prompt(norms[:, None], first) / per_prompt(norms[:, None], mask & ~first)
    assert found.tables["peak"].values.shape == (2, 2, 1)
    assert is_close(found.tables["peak"].values[:, 0], want, CLOSE)
    assert is_far(found.tables["peak"].values[:, 1], want, SAME)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_decoding_and_batches_equal_one_forward(name):
    inputs, model = models.inputs(name), models.tiny(name)
    with manyheads.watch(model, "active_dormant") as seen:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, :-1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = look(model, input_ids=ids, attention_mask=mask, position_ids=places)
    decoded = seen.compute()
    with manyheads.watch(model, "active_dormant") as seen, torch.no_grad():
        for i in range(2):
            begin = int(mask[i].argmax())  # without its padding
            model(ids[i : i + 1, begin:])
    single = seen.compute()
    assert set(whole.tables) == {"sink", "gap", "drain", "peak"}
    for key, made in whole.tables.items():
        assert is_close(made.values, decoded.tables[key].values, CLOSE), key
        assert is_close(made.values, single.tables[key].values, CLOSE), key
        assert is_far(made.values[0], made.values[1], SAME), key
    for a, b in zip(whole.series["sink"], decoded.series["sink"], strict=True):
        assert is_close(a, b, CLOSE) and a.shape == (ids.shape[1],)


def test_looking_changes_no_bit():
    for name in ("llama", "gemma2", "bart"):
        model = models.tiny(name)
        plain = models.forward(name, model)
        with manyheads.watch(model, "active_dormant", "active_dormant:gap=lse"):
            assert torch.equal(models.forward(name, model), plain)


def test_uniform_attention_and_attention_to_oneself():
    q, k, v = drawn()
    even = alone(ActiveDormant(), call_of(torch.zeros_like(q), k, v))
    sink = even.tables["sink"].values
    assert is_close(sink, np.full_like(sink, np.mean([1 / (t + 1) for t in range(1, 7)])), CLOSE)
    assert is_close(even.tables["gap"].values, np.zeros_like(sink), CLOSE, unit=1.0)
    assert is_far(sink, np.full_like(sink, np.mean([1 / (t + 1) for t in range(7)])), CLOSE)  # row 0 is no row
    eye = 50.0 * torch.eye(7, 8).double().expand(2, 4, 7, 8)
    itself = alone(ActiveDormant(), call_of(eye, eye[:, :2], v))
    assert np.all(itself.tables["sink"].values < 1e-12)
    k[:, :, 0] = 0.0
    first = alone(ActiveDormant(), call_of(torch.ones_like(q), k - 9.0 * (k != 0), v))
    assert np.all(first.tables["sink"].values > 0.99) and "4 of 4 heads are dormant" in first.notes[0]


def test_drain_has_no_scale_and_gap_is_of_logits():
    q, k, v = drawn()
    made = alone(ActiveDormant(), call_of(q, k, v))
    again = alone(ActiveDormant(), call_of(q, k, 7.0 * v))
    assert is_close(made.tables["drain"].values, again.tables["drain"].values, CLOSE)
    v[:, :, 0] *= 0.1
    drained = alone(ActiveDormant(), call_of(q, k, v))
    assert is_close(drained.tables["drain"].values, 0.1 * made.tables["drain"].values, CLOSE)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    rows = [logits[:, :, t, 0] - logits[:, :, t, 1 : t + 1].mean(-1) for t in range(1, 7)]
    assert is_close(made.tables["gap"].values[:, 0], torch.stack(rows).mean(0).numpy(), CLOSE)
    rows = [logits[:, :, t, 0] - logits[:, :, t, 1 : t + 1].logsumexp(-1) + np.log(t) for t in range(1, 7)]
    lse = alone(ActiveDormant(gap="lse"), call_of(q, k, v)).tables["gap"].values
    assert is_close(lse[:, 0], torch.stack(rows).mean(0).numpy(), CLOSE)
    assert is_far(lse, made.tables["gap"].values, SAME)


def test_domains_and_their_switch():
    """Both in one prompt, or a prompt of each; ``switch`` is the difference in either case."""
    model, ids = models.tiny("llama"), models.tokens(2, 12)
    halves = TokenSpans({"code": [[(0, 6)]], "prose": [[(6, 12)]]})
    both = look(model, "active_dormant:domains=code+prose", roles=halves, input_ids=ids)
    maps = dense.maps(dense.eager("llama"), input_ids=ids)["self"]
    for row, a in enumerate(maps):
        code, prose = (a[:, :, cut, 0].mean(-1).numpy() for cut in (slice(1, 6), slice(6, 12)))
        assert is_close(both.tables["sink of code"].values[:, row], code, CLOSE)
        assert is_close(both.tables["switch"].values[:, row], code - prose, SAME)
    assert any("code" in note and "0." in note for note in both.notes)
    apart = TokenSpans({"code": [[(0, 12)], []], "prose": [[], [(0, 12)]]})
    split = look(model, "active_dormant:domains=code+prose", roles=apart, input_ids=ids)
    want = split.tables["sink"].values[0] - split.tables["sink"].values[1]
    assert is_close(split.tables["switch"].mean, want)
    assert np.isnan(split.tables["sink of code"].values[1]).all()  # no such row gives NaN, not 0
    one, two = (look(model, input_ids=row[None]).tables["sink"] for row in ids)
    assert is_close(switch(one, two).mean, want)


def test_another_sink_and_a_single_token():
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    found = look(model, "active_dormant:sink=mark", roles=TokenSpans({"mark": [[(3, 4)]]}), input_ids=ids)
    a = dense.maps(dense.eager("llama"), input_ids=ids)["self"][0]
    rows = [t for t in range(9) if t != 3]
    assert is_close(found.tables["sink"].values[:, 0], a[:, :, rows, 3].mean(-1).numpy(), CLOSE)
    assert np.isfinite(found.tables["peak"].values).all()
    short = look(model, input_ids=ids[:, :1])
    assert np.isnan(short.tables["sink"].values).all() and "longer prompts" in short.notes[0]


def test_notes_say_what_the_tables_say():
    sink = np.array([[0.9, 0.1, 0.6, 0.2]])
    from manyheads.lenses.active_dormant.report import notes

    tables = {
        "sink": HeadTable("sink", ("a",), sink, layers=(5,)),
        "drain": HeadTable("drain", ("a",), 1 - sink, layers=(5,)),
        "peak": HeadTable("peak", ("a", "b"), np.array([[2.0], [30.0]]), layers=(5, 6)),
    }
    said = notes(tables, 0.5)
    assert "2 of 4 heads" in said[0] and "5.0 (0.90), 5.2 (0.60)" in said[0] and "3 of 4" not in said[0]
    assert "0.25 times" in said[1] and "0.85 times" in said[1] and "-1.00" in said[1]
    assert "after layer 6" in said[2] and "30.0 times" in said[2]
    assert "3 of 4 heads" in notes(tables, 0.15)[0]


def test_relu_attention_is_its_formula():
    q, k, v = drawn(5, 7)
    call = call_of(q, k, v)
    got = ReLUAttention().attend(call)
    values = v.repeat_interleave(2, 1)
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    for t in range(5):
        seen = t + 3  # five queries stand behind two earlier keys
        want = (s[:, :, t, :seen].clamp(min=0) / seen).unsqueeze(-2) @ values[:, :, :seen]
        assert_close(got[:, t], want[:, :, 0], FORMULA)
        assert error(got[:, t], call.attend()[:, t]) > 1e-2
    assert_close(ReLUAttention().attend(call.replace(k=3 * k)), 3 * got, FORMULA)
    assert float((relu_weights(call).sum(-1) - 1).abs().max()) > 0.1
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[..., :2] = False  # padding neither is seen nor counts as a key
    assert_close(
        ReLUAttention().attend(call.replace(mask=mask)), ReLUAttention().attend(call_of(*(q, k[:, :, 2:], v[:, :, 2:])))
    )
    assert torch.autograd.gradcheck(
        lambda *x: ReLUAttention().attend(call_of(*x)), [x.clone().requires_grad_() for x in (q, k, v)]
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_relu_attention_trains_through_the_port(name):
    model, ids = models.build(name), models.tokens(2, 10)
    plain = float(model(ids, labels=ids).loss)
    with manyheads.use(model, ReLUAttention()):
        for p in model.parameters():
            p.requires_grad_()
        loss = model(ids, labels=ids).loss
        loss.backward()
        with manyheads.watch(model, "active_dormant:attention=relu") as seen:
            assert torch.equal(model(ids, labels=ids).loss, loss)
    assert abs(loss.item() - plain) > 1e-3
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())
    query = next(g for n, g in grads.items() if "q_proj" in n or "c_attn" in n)
    assert float(query.abs().max()) > 0
    found = seen.compute()
    assert "gap" not in found.tables and np.isfinite(found.tables["sink"].values).all()
    with manyheads.use(model, ReLUAttention(), Keep()) as port, torch.no_grad():
        model(ids)
    (_, memory), *_ = port.kept(port.strategies[1])
    want = relu_weights(memory["call"])[:, :, 1:, 0].mean(-1).numpy()
    assert is_close(found.tables["sink"].values[:, 0], want, CLOSE)
    assert error(torch.tensor(want), torch.tensor(look(model, input_ids=ids).tables["sink"].values[:, 0])) > SAME
