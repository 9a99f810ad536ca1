# SPDX-License-Identifier: Apache-2.0
"""Attention alignment: the temperature against its formula, and calibration against what it promises."""

import math

import pytest
import torch

from manyheads import UserError, parse, use
from manyheads.attention.reference import causal_mask
from manyheads.call import AttentionCall, Site
from manyheads.calls.visible import keys_seen
from manyheads.integrations.transformers import find_sites
from manyheads.mixers import _mixer
from manyheads.mixers._mixer import edited
from manyheads.mixers.t5_attention_alignment import AttentionAlignment, calibrate
from manyheads.mixers.t5_attention_alignment.calibration import _solved, peakedness
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.strategy import AttentionEdit, AttentionWatch
from oracles import models
from tolerance import DRAWN, FORMULA, MODEL, SAME, WRONG, assert_close, error, nearly

ENCODER, DECODER = Site("encoder", 0, 0, "self", False, 4, 2), Site("decoder", 1, 1, "self", True, 4, 2)
TABLE = "t5_attention_alignment:align=entropy,trained=8,lengths=16+32,taus=0.8+0.6"


def call(site=ENCODER, queries=12, keys=12, **fields):
    made = {"q": (2, 4, queries, 6), "k": (2, 2, keys, 6), "v": (2, 2, keys, 5), "bias": (1, 4, queries, keys)}
    draw = {name: torch.randn(shape, dtype=torch.float64) for name, shape in made.items()}
    return AttentionCall(site, scale=0.7, **{**draw, **fields})


def explicit(c, tau):
    """``softmax((scale q.k + bias) / tau) v`` with tau ``[..., T, 1]``, by its formula."""
    k, v = (x.repeat_interleave(2, 1) for x in (c.k, c.v))
    x = (c.scale * (c.q @ k.mT) + (0 if c.bias is None else c.bias)) / tau
    if (allowed := c.allowed()) is not None:
        x = x.masked_fill(~allowed, -torch.inf)
    return (x.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_is_softmax_of_all_logits_over_tau(causal, bias):
    c = call(is_causal=causal, **({} if bias else {"bias": None}))
    n = torch.arange(1, 13) if causal else torch.full((12,), 12)
    tau = torch.where(n > 8, 0.5, 1.0).double()[:, None]
    edited = parse("t5_attention_alignment:tau=0.5,trained=8").edit(c)
    want = explicit(c, tau)
    assert_close(edited.attend(), want, FORMULA)
    mask = edited.bias if edited.allowed() is None or not bias else edited.bias.masked_fill(~causal_mask(12, 12), -1e9)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        edited.q, edited.k, edited.v, attn_mask=mask if bias else None, is_causal=causal and not bias, scale=c.scale,
        enable_gqa=True,
    )  # fmt: skip
    assert_close(sdpa.transpose(1, 2), want, FORMULA)
    if bias:  # controls: the temperature on one of the two only
        assert error(edited.replace(bias=c.bias).attend(), want) > 1e-2
        assert error(edited.replace(q=c.q).attend(), want) > 1e-2


def test_rows_keep_their_order_and_a_cold_row_is_a_hard_maximum():
    c = call()
    for tau in (0.9, 0.5, 0.01):
        edited = parse(f"t5_attention_alignment:tau={tau},trained=8").edit(c)
        x, y = (one.scale * (one.q @ one.k.repeat_interleave(2, 1).mT) + one.bias for one in (c, edited))
        assert torch.equal(x.argsort(-1), y.argsort(-1))
    best = c.v.repeat_interleave(2, 1).gather(2, x.argmax(-1)[..., None].expand(-1, -1, -1, 5)).transpose(1, 2)
    cold = parse("t5_attention_alignment:tau=0.0001,trained=8").edit(c).attend()
    assert_close(cold, best)
    assert error(c.attend(), best) > 0.1  # control


SPECS = [
    "t5_attention_alignment:trained=8",
    "t5_attention_alignment:align=gaussian,trained=8,spread=1.3",
    TABLE,
    "t5_attention_alignment:align=none,trained=8",
    "t5_attention_alignment:tau=0.7,trained=8",
]


@pytest.mark.parametrize("spec", SPECS)
def test_one_up_to_the_trained_length_and_falling_beyond(spec):
    s = parse(spec)
    tau = s.temperature(0, torch.arange(1, 64)[None, None])[0, 0]
    assert tau[:8].eq(1).all() and (tau.diff() <= 1e-12).all()
    assert tau[-1] == 1 if s.align == "none" and s.tau is None else tau[-1] < 0.8
    short = call(queries=8, keys=8)
    assert s.edit(short) is short


def test_what_each_rule_gives():
    n = torch.tensor([[[8, 12, 16, 24, 32, 99]]])
    ln = [math.log(x) for x in (8, 12, 16, 24, 32, 99)]
    got = {spec: parse(spec).temperature(0, n).flatten().tolist() for spec in SPECS}
    assert got[SPECS[0]] == nearly([ln[0] / x for x in ln])
    assert got[SPECS[1]] == nearly([1.3 / math.sqrt(1.3**2 + 2 * (x - ln[0])) for x in ln])
    near, far = (ln[1] - ln[0]) / (ln[2] - ln[0]), (ln[3] - ln[2]) / (ln[4] - ln[2])
    assert got[TABLE] == nearly([1, 1 - 0.2 * near, 0.8, 0.8 - 0.2 * far, 0.6, 0.6])


def test_a_table_by_site_and_head():
    s = parse("t5_attention_alignment:align=pmax,trained=8,lengths=16+32,sites=0+3,taus=.9+.8+.7+.6+.5+.4+.3+.2")
    n = torch.tensor([[[16, 32]]])
    assert s.temperature(0, n)[0].tolist() == [nearly([0.9, 0.5]), nearly([0.8, 0.4])]
    assert s.temperature(3, n)[0].tolist() == [nearly([0.7, 0.3]), nearly([0.6, 0.2])]
    assert s.selects(ENCODER) and not s.selects(DECODER)
    with pytest.raises(UserError, match="4 heads, 2 were calibrated"):
        s.edit(call())


def test_keys_seen():
    real = torch.tensor([[1] * 6, [0, 0] + [1] * 4], dtype=torch.bool)[:, None, None]
    low = torch.zeros(1, 1, 4, 6).masked_fill(~causal_mask(4, 6), torch.finfo(torch.float32).min)
    sizes = {"queries": 4, "keys": 6}
    assert keys_seen(call(**sizes, bias=None)).flatten().tolist() == [6]
    assert keys_seen(call(**sizes, bias=None, is_causal=True)).flatten().tolist() == [3, 4, 5, 6]
    assert keys_seen(call(**sizes, bias=None, mask=real)).flatten().tolist() == [6, 4]
    both = keys_seen(call(**sizes, bias=None, mask=real, is_causal=True))
    assert both[:, 0].tolist() == [[3, 4, 5, 6], [1, 2, 3, 4]]
    assert keys_seen(call(**sizes, bias=low)).flatten().tolist() == [3, 4, 5, 6]
    edited = AttentionAlignment(tau=0.5, trained=4).edit(call(**sizes, bias=low))
    assert edited.bias.isfinite().all()  # what says "not to be seen" is not divided
    assert_close(edited.bias, low, SAME)


def solved(x, target):
    """One temperature for all rows of ``x``, each of which sees all keys."""
    found = {0: (x, torch.full((1, 1, 1), x.shape[-1]))}
    return float(_solved(found, lambda tau: AttentionAlignment(tau=tau[0]), target, "entropy", "model"))


# Of six draws the root mean square of what 150 rows of 512 and 2,048 finite logits are off by.
@pytest.mark.parametrize(("s", "expected"), [(0.5, 0.002), (1.0, 0.006), (1.5, 0.0145)])
def test_normal_logits_have_a_closed_form(s, expected):
    generator = torch.Generator().manual_seed(0)
    x = {n: s * torch.randn(1, 1, 150, n, generator=generator) for n in (512, 2048)}
    target = peakedness(x[512], torch.ones(1, 1, 1), "entropy").double().view(1, 1)
    tau = solved(x[2048], target)
    right, wrong = (
        float(parse(f"t5_attention_alignment:align=gaussian,spread={x:g}").temperature(0, torch.full((1, 1, 1), 2048)))
        for x in (s, 1.3 * s)
    )
    assert abs(tau - right) < DRAWN * expected and abs(tau - wrong) > WRONG * expected
    assert float(peakedness(x[2048], torch.full((1, 1, 1), tau), "entropy")) == nearly(float(target), torch.float32)


def test_the_closed_form_fails_for_wide_logits():
    generator = torch.Generator().manual_seed(0)
    x = {n: 3.5 * torch.randn(1, 1, 150, n, generator=generator) for n in (512, 2048)}
    target = peakedness(x[512], torch.ones(1, 1, 1), "entropy").double().view(1, 1)
    assert 3.5 / math.sqrt(3.5**2 + 2 * math.log(4)) - solved(x[2048], target) > 0.04


class Peaks(AttentionWatch):
    """Watches how peaked the rows are that see the most keys: entropy and largest weight, ``[H]`` each."""

    def watch(self, call, out):
        k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        x = call.scale * (call.q @ k.mT) + (0 if call.bias is None else call.bias)
        if (allowed := call.allowed()) is not None:
            x = x.masked_fill(~allowed, -torch.inf)
        p = (x if not call.site.causal else x[:, :, -8:]).softmax(-1)
        call.state["entropy"] = -(p * p.clamp(min=1e-30).log()).sum(-1).mean((0, 2))
        call.state["pmax"] = p.amax(-1).mean((0, 2))


def peaks(model, given, strategy, kind, where):
    """``[sites, H]`` of what a transformers model does under ``strategy``, by a watch of its own."""
    watch = Peaks()
    with torch.no_grad(), use(model, strategy, watch) as port:
        model(**given)
        kept = port.state(watch)
    return torch.stack([m[kind] for name, m in kept.items() if where in name])


def given(name, length):
    ids = models.tokens(3, 96)[:, :length]
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


@pytest.mark.parametrize("align", ["entropy", "pmax"])
@pytest.mark.parametrize("per", ["model", "layer", "head"])
@pytest.mark.parametrize(("name", "where", "path"), [("llama", "self", ""), ("t5", "encoder", "encoder")])
def test_calibration_keeps_its_promise(name, where, path, per, align):
    model = models.tiny(name)
    s = calibrate(
        AttentionAlignment(trained=24, where=where), model, given(name, 96), [48, 96], align=align, per=per, port=use,
        rows=96 if path else 8, rounds=8,
    )  # fmt: skip
    pool = {"model": lambda x: x.mean(), "layer": lambda x: x.mean(1), "head": lambda x: x}[per]
    none = parse("t5_attention_alignment:align=none")
    target = pool(peaks(model, given(name, 24), none, align, path))
    for length in (48, 96):
        got, flat = (pool(peaks(model, given(name, length), one, align, path)) for one in (s, none))
        assert (got / target - 1).abs().max() < 0.01
        assert (flat / target - 1).abs().max() > 0.03  # control: without it
    assert parse(s.spec) == s
    assert len(s.taus) == {"model": 2, "layer": 4, "head": 16}[per]


def decoder(**fields):
    torch.manual_seed(0)
    text = ",".join(f"{k}={v}" for k, v in ({"position": "t5"} | fields).items())
    made = Decoder(f"softmax:{text}", DecoderConfig(vocab=64, dim=32, layers=2, heads=4, kv_heads=2, length=24))
    for p in made.blocks.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.3)
    return made.eval()


@pytest.mark.parametrize("align", ["entropy", "pmax"])
@pytest.mark.parametrize("per", ["model", "head"])
@pytest.mark.parametrize("position", ["t5", "rope"])
def test_calibration_of_a_decoder(position, per, align, monkeypatch):
    model, ids, found = decoder(position=position), models.tokens(3, 96), []
    plain = _mixer.masked_attention

    def spy(q, k, v, spec, *, scale, bias=None, **rest):
        x = scale * (q @ k.repeat_interleave(2, 1).mT) + (0 if bias is None else bias)
        p = x.masked_fill(~causal_mask(x.shape[2], x.shape[3]), -torch.inf)[:, :, -8:].softmax(-1)
        found.append((-(p * p.clamp(min=1e-30).log()).sum(-1) if align == "entropy" else p.amax(-1)).mean((0, 2)))
        return plain(q, k, v, spec, scale=scale, bias=bias, **rest)

    s = calibrate(AttentionAlignment(trained=24), model, ids, [48, 96], align=align, per=per, rows=8)
    monkeypatch.setattr(_mixer, "masked_attention", spy)

    def measured(length):
        found.clear()
        with torch.no_grad():
            model(ids[:, :length])
        return torch.stack(found).mean() if per == "model" else torch.stack(found)

    target = measured(24)
    for length in (48, 96):
        flat = measured(length)
        with s.on(model):
            assert (measured(length) / target - 1).abs().max() < 0.01
        assert (flat / target - 1).abs().max() > 0.03  # control
    assert torch.equal(measured(96), flat)  # nothing is left behind


def test_calibration_finds_the_closed_form_or_the_rule():
    model, ids = decoder(), models.tokens(3, 96)
    trained = AttentionAlignment(trained=24)
    assert calibrate(trained, model, ids, [48], align="logn") == trained
    by_head = calibrate(trained, model, ids, [], align="gaussian", per="head")
    assert len(by_head.spread) == 8 and parse(by_head.spec) == by_head
    one = calibrate(trained, model, ids, [], align="gaussian")
    chosen = parse("t5_attention_alignment:trained=24,where=decoder,layers=1,tau=0.5")  # its own tau is not used
    again = calibrate(chosen, model, ids, [48])
    assert (again.where, again.layers, again.tau, again.lengths) == ("decoder", (1,), None, (48,))
    assert again.taus != calibrate(trained, model, ids, [48]).taus  # control: of all layers
    assert one.spread[0] ** 2 == nearly(sum(x * x for x in by_head.spread) / 8, torch.float32, MODEL)


@pytest.mark.parametrize("fields", [{}, {"position": "rope"}, {"position": "alibi"}, {"window": 12}], ids=str)
def test_a_decoder_reads_in_pieces_padded_or_packed_as_in_one(fields):
    model, ids = decoder(**fields).double(), models.tokens(2, 40)
    s = parse("t5_attention_alignment:trained=8")
    plain = model(ids)[0]
    with s.on(model), torch.no_grad():
        whole = model(ids)[0]
        parts, state = [], None
        for piece in ids.split([11, 1, 1, 27], 1):
            y, state = model(piece, state=state)
            parts.append(y)
        assert_close(torch.cat(parts, 1), whole)
        mask = torch.cat([torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)], 1)
        padded = model(torch.nn.functional.pad(ids, (5, 0)), mask=mask)[0]
        assert_close(padded[:, 5:], whole)
        packed = model(ids.reshape(1, -1), cu_seqlens=torch.tensor([0, 40, 80]))[0]
        assert_close(packed.view(2, 40, -1), whole)
    assert_close(plain[:, :8], whole[:, :8], FORMULA)
    assert error(plain[:, 8:], whole[:, 8:]) > 1e-3  # control: it does something


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_decoding_is_reading(name):
    model, s = models.tiny(name), parse("t5_attention_alignment:trained=6,where=all")
    g = models.inputs(name)
    more = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with use(model, s), torch.no_grad():
        out = model.generate(**g, **more)
        if name == "t5":
            want = model(**g, decoder_input_ids=out.sequences).logits[:, :-1]
        else:
            mask = torch.nn.functional.pad(g["attention_mask"], (0, 8), value=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            want = model(out.sequences, attention_mask=mask, position_ids=positions).logits[:, 18:-1]
    assert_close(torch.stack(out.logits, 1), want, SAME)
    with torch.no_grad():
        assert error(models.forward(name, model), _under(s, name, model)) > 1e-2  # control: it does something


def _under(strategy, name, model):
    with use(model, strategy):
        return models.forward(name, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_sdpa_and_the_eager_function_of_a_model_agree(name):
    s = parse("t5_attention_alignment:trained=6,where=all")
    real = slice(None) if name == "t5" else models.inputs(name)["attention_mask"].bool()  # rows of padding say nothing
    sdpa, eager = (_under(s, name, models.build(name, attn=attn))[real] for attn in ("sdpa", "eager"))
    assert_close(sdpa, eager, SAME)


def test_where():
    model, found = models.tiny("t5"), {}
    for where in ("self", "encoder", "decoder", "cross", "all"):
        s = AttentionAlignment(trained=6, where=where)
        found[where] = sum(s.selects(site) for site, _ in find_sites(model))
    assert found == {"self": 4, "encoder": 2, "decoder": 2, "cross": 2, "all": 6}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("align=entropy", "calibrate, or take align=logn"),
        ("align=gaussian", "calibrate, or take align=logn"),
        ("trained=1", "at least 2"),
        ("tau=0", "positive"),
        ("align=pmax,lengths=2048+1024,taus=.5+.4", "ascend"),
        ("align=pmax,lengths=512,taus=.5", "longer than the trained"),
        ("align=pmax,lengths=1024+2048,taus=.5+.4+.3", "as many for every one"),
    ],
)
def test_errors(spec, says):
    with pytest.raises(UserError, match=says):
        parse(f"t5_attention_alignment:{spec}")


class Hides(AttentionEdit):
    slug = "hides"

    def edit(self, call):
        return call.replace(mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))


def test_refusals():
    s = AttentionAlignment(trained=6)
    for c in (call(softcap=5.0), call(sinks=torch.zeros(4))):
        with pytest.raises(UserError, match="layers="):
            s.edit(c)
    with pytest.raises(UserError, match="no softmax mixer"), s.on(torch.nn.Linear(2, 2)):
        pass
    with edited(decoder(), Hides()) as model, pytest.raises(UserError, match="edits the mask"):
        model(models.tokens(1, 9))
    with pytest.raises(UserError, match="reads 96 tokens"):
        calibrate(s, decoder(), models.tokens(1, 50), [96])
