# SPDX-License-Identifier: Apache-2.0
"""Norms of channels equal their formula on real models; selective damage does what it says, row by row."""

import math

import numpy as np
import pytest
import torch

import manyheads
from manyheads.attention.rope import rotate
from manyheads.errors import UserError
from manyheads.lenses.massive_values import agreement, massive, peak
from oracles import dense, models
from tolerance import CLOSE, SAME, assert_close, error, is_close, is_far

NAMES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "bert", "bart", "whisper")


class Take(manyheads.strategy.AttentionWatch):
    """Keeps every call and its output."""

    def watch(self, call, out):
        call.state.setdefault("calls", []).append((call, out))


def given(name):
    made = models.inputs(name)
    if name in models.SEQ2SEQ:
        made["decoder_input_ids"] = models.tokens(2, 11, seed=1)
    return made


def looked(model, **inputs):
    """Findings of the lens, and the calls that it saw, by site."""
    take = Take()
    seen = manyheads.watch(model, "massive_values:threshold=1.5")
    with manyheads.use(model, take) as port, seen, torch.no_grad():
        model(**inputs)
    return seen.compute(), [(site, memory["calls"]) for site, memory in port.kept(take)]


def taken(model, *strategies, **inputs):
    """The calls of one forward after ``strategies``, in the order of the sites."""
    take = Take()
    with manyheads.use(model, *strategies, take) as port, torch.no_grad():
        model(**inputs)
    return [memory["calls"][0] for _, memory in port.kept(take)]


def damaged(name, spec, **inputs):
    """The call of the first layer without the damage, and with it."""
    inputs = inputs or models.inputs(name)
    model = models.tiny(name)
    return taken(model, **inputs)[0][0], taken(model, f"massive_values:{spec}", **inputs)[0][0]


def valid(call):
    """Tokens of ``models.inputs``: the first five of the second row are padding."""
    rows = torch.ones(2, call.q.shape[2], dtype=torch.bool)
    rows[1, :5] = False
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_norms_equal_their_formula(name):
    """Queries, keys and values of self- and cross-attention; padding does not count."""
    inputs = given(name)
    found, sites = looked(models.tiny(name), **inputs)
    for row, (_, calls) in enumerate(sites):
        for key in "qkv":
            x = getattr(calls[0][0], key)
            rows = inputs.get("attention_mask")
            if rows is None or rows.shape[1] != x.shape[2]:  # the decoder's 11 tokens are all there
                rows = torch.ones(2, x.shape[2])
            square = (x.square() * rows[:, None, :, None]).sum(2) / rows.sum(1)[:, None, None]
            norms, heads = square.sqrt().numpy(), x.shape[1]
            want = norms.max(-1) / norms.mean(-1)
            assert is_close(found.tables[f"peak {key}"].values[:, row, :heads], want, CLOSE)
            count = (norms > 1.5 * norms.mean(-1, keepdims=True)).sum(-1)
            assert np.array_equal(found.tables[f"massive {key}"].values[:, row, :heads], count)
            assert is_close(found.channels[key][row][:heads, : x.shape[3]], norms.mean(0), CLOSE)
            if "attention_mask" in inputs and x.shape[2] == 19:
                wrong = x.square().mean(2).sqrt().numpy()  # with padding
                assert is_far(found.channels[key][row][:heads, : x.shape[3]], wrong.mean(0), SAME)
    # grouped heads have a row for each key head
    assert found.tables["peak k"].mean.shape[1] == (2 if name in models.ROTARY else 4)


def test_the_calls_are_those_of_the_maps():
    """What is measured is what attention multiplies: q and k of the calls give the maps that the model returns."""
    for name in ("llama", "gpt2", "qwen3"):
        inputs = models.inputs(name)
        maps = dense.maps(dense.eager(name), **inputs)["self"]
        for (call, _), want in zip(taken(models.tiny(name), **inputs), maps, strict=True):
            keys = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
            logits = (call.q @ keys.transpose(-1, -2) * call.scale).masked_fill(~call.allowed(), -torch.inf)
            rows = valid(call)[:, None].expand(-1, call.q.shape[1], -1)
            assert_close(logits.softmax(-1)[rows], want[rows], SAME)


def test_pairs_in_the_order_of_frequency():
    """Pairs are channels i and i + d/2 of the model's tables; a model that turns others faster is read as it is."""
    model = models.build("llama", head_dim=8, max_position_embeddings=256)
    inputs = models.inputs("llama")
    found, sites = looked(model, **inputs)
    call = sites[0][1][0][0]
    rows = valid(call)
    square = torch.stack([call.q[n][:, rows[n]].square().mean(1) for n in range(2)])
    want = (square[..., :4] + square[..., 4:]).sqrt().mean(0).numpy()
    assert is_close(found.channels["q pairs"][0], want, CLOSE)
    wrong = (square[..., ::2] + square[..., 1::2]).sqrt().mean(0).numpy()  # the interleaved layout
    assert is_far(found.channels["q pairs"][0], wrong, SAME)
    turns = found.channels["tokens a turn"][0, 0]
    frequencies = model.model.rotary_emb.inv_freq
    assert is_close(turns, 2 * math.pi / frequencies.double().numpy(), CLOSE)
    order = torch.tensor([2, 0, 3, 1])
    model.model.rotary_emb.inv_freq = frequencies[order]
    found, sites = looked(model, **inputs)
    assert is_close(found.channels["tokens a turn"][0, 0], turns)
    square = torch.stack([sites[0][1][0][0].q[n][:, rows[n]].square().mean(1) for n in range(2)])
    want = (square[..., :4] + square[..., 4:]).sqrt().mean(0).numpy()
    assert is_close(found.channels["q pairs"][0], want[:, order.argsort().numpy()], CLOSE)
    assert is_far(found.channels["q pairs"][0], want, SAME)


def test_a_rotation_moves_no_energy_between_pairs():
    """Before and after rotary positions the pairs are the same and the channels are not."""
    model, inputs = models.tiny("llama"), models.inputs("llama")
    found, sites = looked(model, **inputs)
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs["input_ids"]))
    keys = model.model.layers[0].self_attn.k_proj(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
    call = sites[0][1][0][0]
    assert_close(rotate(keys, call.rotary), call.k, SAME)
    rows = valid(call)[:, None, :, None]
    before, after = ((x.square() * rows).sum(2) for x in (keys, call.k))
    assert_close(before[..., :4] + before[..., 4:], after[..., :4] + after[..., 4:], SAME)
    assert error(before, after) > 1e-2
    for name, square in (("peak k before", before), ("peak k", after)):
        assert is_close(found.tables[name].values[:, 0, :2], peak(square.sqrt().numpy()), CLOSE)


def test_scores():
    norms = np.array([[[1.0, 1.0, 10.0, 4.0], [2.0, 2.0, 2.0, 2.0]]])
    assert peak(norms).tolist() == [[2.5, 1.0]]
    assert massive(norms, 2.4).tolist() == [[1.0, 0.0]] and massive(norms, 2.5).tolist() == [[0.0, 0.0]]  # strict
    assert np.array_equal(massive(norms * 1e3, 2.4), massive(norms, 2.4))
    assert agreement(np.eye(4)[[2, 2, 2, 0]][None]).tolist() == [0.75]
    assert np.isnan([peak(norms * np.nan), massive(norms * np.nan, 2)]).all() and np.isnan(agreement(norms * np.nan))


def test_decoding_padding_and_batches():
    """A prompt alone, in a batch, padded, or decoded token by token: the same norms."""
    model, ids = models.tiny("llama"), models.tokens(2, 14)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(18) >= 4).long().expand(2, -1)
    with manyheads.watch(model, "massive_values") as seen, torch.no_grad():
        for row in ids:
            model(row[None])
        model(ids)
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        model(torch.cat([ids, torch.full((2, 3), 9)], 1), attention_mask=torch.cat([mask[:, 4:], mask[:, :3]], 1))
        cache = model(ids[:, :5], use_cache=True).past_key_values
        for t in range(5, 14):
            model(ids[:, t : t + 1], past_key_values=cache)
    found = seen.compute()
    for table in found.tables.values():
        values = table.values.reshape(5, 2, *table.values.shape[1:])
        assert is_close(values, np.broadcast_to(values[:1], values.shape).copy(), SAME), table.name
    assert is_far(found.tables["peak q"].values[0], found.tables["peak q"].values[1])
    assert len(found.notes) == 3 and "turns once in" in found.notes[1]


@pytest.mark.parametrize("name", models.ALL)
def test_looking_and_an_edit_that_is_off_change_no_bit(name):
    """As a lens, as a strategy without damage, and with no channel to damage; damage does change something."""
    model = models.tiny(name)
    plain = models.forward(name, model)
    with manyheads.watch(model, "massive_values"):
        assert torch.equal(models.forward(name, model), plain)
    for spec in ("massive_values", "massive_values:damage=top,channels=0"):
        with manyheads.use(model, spec):
            assert torch.equal(models.forward(name, model), plain)
    with manyheads.use(model, "massive_values:damage=top"):
        assert error(models.forward(name, model), plain) > 1e-3
    assert torch.equal(models.forward(name, model), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
def test_damage_equals_its_formula(name):
    """Head by head and row by row: the k channels of greatest, or least, norm become their mean over tokens."""
    for damage, pick in (("top", lambda n: n.topk(3).indices), ("bottom", lambda n: (-n).topk(3).indices)):
        plain, made = damaged(name, f"damage={damage},channels=3")
        rows = valid(plain)
        assert torch.equal(made.v, plain.v)
        for key in "qk":
            want = getattr(plain, key).clone()
            for n in range(2):
                for h in range(want.shape[1]):
                    tokens = want[n, h][rows[n]]
                    best = pick(tokens.norm(dim=0))
                    want[n, h][:, best] = tokens[:, best].mean()
            assert_close(getattr(made, key), want, SAME)
            assert error(getattr(made, key), getattr(plain, key)) > 1e-3


@pytest.mark.parametrize("by", ["means", "max", "min", "zero"])
def test_what_channels_become(by):
    plain, made = damaged("llama", f"damage=top,channels=2,of=k,by={by}")
    assert torch.equal(made.q, plain.q)
    tokens = plain.k[1, 0][valid(plain)[1]]
    best = tokens.norm(dim=0).topk(2).indices
    want = {"means": tokens[:, best].mean(0), "max": tokens[:, best].max(), "min": tokens[:, best].min(), "zero": 0.0}
    assert_close(made.k[1, 0][:, best], torch.as_tensor(want[by]).expand(19, 2), SAME)


@pytest.mark.parametrize("damage", ["top", "bottom", "random"])
def test_a_row_of_a_batch_is_damaged_as_if_alone(damage):
    """Padding and neighbours do not count; padding that did would make a difference."""
    model, spec = models.tiny("llama"), f"massive_values:damage={damage},channels=2"
    inputs = models.inputs("llama")
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with manyheads.use(model, spec), torch.no_grad():
        both = model(**inputs, position_ids=places).logits
        first = model(inputs["input_ids"][:1]).logits
        second = model(inputs["input_ids"][1:, 5:]).logits
        whole = model(inputs["input_ids"][1:]).logits
    assert_close(both[0], first[0], SAME)
    assert_close(both[1, 5:], second[0], SAME)
    assert error(both[1, 5:], whole[0, 5:]) > 1e-3


def test_all_keys_at_their_mean_leave_uniform_attention():
    calls = taken(models.tiny("llama"), "massive_values:damage=top,channels=8,of=k", input_ids=models.tokens(1, 12))
    for call, out in calls:
        shares = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
        values = call.v.repeat_interleave(2, 1)
        assert_close(out, (shares @ values).transpose(1, 2), SAME)
        one = call.replace(k=call.k + torch.randn(1, 1, 12, 8)).attend()
        assert error(one, (shares @ values).transpose(1, 2)) > 1e-2


def test_twice_is_once_and_a_seed_is_another_choice():
    model, ids = models.tiny("llama"), models.tokens(2, 12)

    def logits(*specs):
        with manyheads.use(model, *specs), torch.no_grad():
            return model(ids).logits

    spec = "massive_values:damage=random,channels=3"
    once = logits(spec)
    assert_close(logits(spec, manyheads.parse(spec)), once, SAME)
    assert error(logits(spec, f"{spec},seed=1"), once) > 1e-3 and error(logits(f"{spec},seed=1"), once) > 1e-3
    assert_close(logits(f"{spec},by=means", f"{spec},by=means,of=k"), logits(f"{spec},by=means"), SAME)


def test_the_cache_keeps_the_damage_or_not():
    """Decoding after a damaged prompt sees damaged keys, or with affect_cache=false those of the model."""
    model, ids = models.tiny("llama"), models.tokens(2, 12)
    spec = "massive_values:damage=top,channels=3"

    def cached(*specs, pieces=(12,)):
        cache, start = None, 0
        with manyheads.use(model, *specs), torch.no_grad():
            for size in pieces:
                out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, start + size
            keys = [layer.keys.clone() for layer in cache.layers]
            return keys, out.logits, model(ids[:, :1], past_key_values=cache).logits

    plain, hit, spared = cached(), cached(spec), cached(f"{spec},affect_cache=false")
    call = taken(model, spec, input_ids=ids)[0][0]
    assert_close(hit[0][0], call.k, SAME)
    assert torch.equal(spared[0][0], plain[0][0]) and error(hit[0][0], plain[0][0]) > 1e-2
    assert_close(hit[1], spared[1], SAME)
    assert error(hit[2], spared[2]) > 1e-3
    pieces = cached(spec, pieces=(7, 5))[0][0]  # the first piece as if alone, once
    assert_close(pieces[:, :, :7], taken(model, spec, input_ids=ids[:, :7])[0][0].k, SAME)
    one = cached(spec, pieces=(11, 1))[0][0]  # one token is no prompt
    assert_close(one[:, :, 11], plain[0][0][:, :, 11], SAME)
    with pytest.raises(UserError, match="affect_cache=false"), manyheads.use(model, "full", spec):
        model(ids, use_cache=True)


def test_gradients_through_the_damage():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=generator).double().requires_grad_() for h in (4, 2, 2))
    site = manyheads.Site("x", 0, 0, "self", True)
    for by in ("mean", "means", "zero"):
        lens = manyheads.parse(f"massive_values:damage=top,channels=2,by={by}")

        def attended(q, k, v, lens=lens):
            return lens.edit(manyheads.AttentionCall(site, q, k, v, scale=0.5, is_causal=True)).attend()

        before = k.detach().clone()
        assert torch.autograd.gradcheck(attended, (q, k, v))
        assert torch.equal(k, before)  # nothing is changed in place where gradients flow


def test_values_are_a_control_of_their_own():
    plain, made = damaged("llama", "damage=top,channels=2,of=v")
    assert torch.equal(made.q, plain.q) and torch.equal(made.k, plain.k) and error(made.v, plain.v) > 1e-2
    model, inputs = models.tiny("bart"), given("bart")
    kinds = {call.site.kind for call, _ in taken(model, **inputs)}
    assert kinds == {"self", "cross"}
    for call, _ in taken(model, "massive_values:damage=top,of=k", **inputs):  # cross-attention is left alone
        constant = bool((call.k[0].std(1) < 1e-6).any())
        assert constant == (call.site.kind == "self")


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model, ids = models.build("llama"), models.tokens(2, 12)
    fast = torch.compile(model, backend="eager")
    with manyheads.watch(model, "massive_values") as seen, torch.no_grad():
        fast(ids)
    assert is_close(seen.compute().tables["peak k"].values, looked(model, input_ids=ids)[0].tables["peak k"].values)
    with manyheads.use(model, "massive_values:damage=top"), torch.no_grad():
        assert_close(fast(ids).logits, model(ids).logits, SAME)
    torch._dynamo.reset()


def test_refusals():
    model, ids = models.tiny("llama"), models.tokens(1, 6)
    with pytest.raises(UserError, match="acts on the model"):
        manyheads.watch(model, "massive_values:damage=top")
    with pytest.raises(UserError, match="heads have 8"), manyheads.use(model, "massive_values:damage=top,channels=9"):
        model(ids)
    with pytest.raises(UserError, match="massive_values"):
        manyheads.parse("massive_values:damage=all")


def planted(channels, bits=3, keep="top", per="token"):
    """Keys of which channel 2 is a hundred times the others, and what rounding makes of them: ``[1, 2, 9, 8]``."""
    k = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    k[..., 2] = 100.0
    rule = manyheads.parse(f"massive_values.round_keys:bits={bits},keep={keep},channels={channels},per={per}")
    return k, rule._rounded(k, None, 0)


def test_rounding_with_a_massive_channel_kept_is_finer():
    def loss(channels, **more):
        k, rounded = planted(channels, **more)
        return float((k - rounded)[..., [0, 1, 3, 4, 5, 6, 7]].abs().max())

    # The greatest of 100 in 3 bits makes steps of 33: all the others become 0. Kept, the step is 2 / 3 at most.
    assert loss(0) > 1.9 and loss(1) < 0.34 and loss(1, keep="bottom") > 1.9
    assert loss(0, per="channel") < 0.34  # a scale of its own for each channel
    k, rounded = planted(1)
    assert torch.equal(rounded[..., 2], k[..., 2]) and not torch.equal(rounded, k)
    k, rounded = planted(3, keep="random")
    assert ((k == rounded).all(2).sum(-1) >= 3).all()
    k, rounded = planted(0, bits=8)
    assert (k - rounded).abs().max() <= 100 / 127 / 2 + 1e-5
    steps = rounded / (100.0 / 127)
    assert_close(steps, steps.round(), CLOSE)


def test_rounding_acts_on_a_model_row_by_row():
    model, ids = models.tiny("llama"), models.tokens(2, 7)
    with torch.no_grad():
        plain = model(ids).logits
        with manyheads.use(model, "massive_values.round_keys:bits=2,channels=2"):
            both = model(ids).logits
            each = torch.cat([model(row[None]).logits for row in ids])
    assert (both - plain).abs().max() > 1e-4
    assert_close(both, each, SAME)
    with pytest.raises(UserError, match="leaves nothing to round"):
        planted(8)
    with pytest.raises(UserError, match="bits from 2 to 8"):
        manyheads.parse("massive_values.round_keys:bits=1")
