# SPDX-License-Identifier: Apache-2.0
"""FireQ: factors from their formula, exactness of the scaling in whole models, composition and refusals."""

import math

import pytest
import torch
from torch import nn

import manyheads
from caches.codes import looked, packed
from caches.formula import site
from manyheads import UserError, parse
from manyheads.attention import rope
from manyheads.caches._view import CacheView
from manyheads.strategy import AttentionEdit
from oracles import caches, models
from oracles.caches import prefilled, step, stores
from tolerance import CLOSE, FORMULA, MODEL, assert_close, error, is_close, is_far, within

DIM, HEADS, LENGTH = 8, 2, 19


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(k, rotary_dim=DIM, padding=0, here=None):
    """What a policy sees of the first forward: ``k [B, Hkv, N, d]``, the first ``padding`` columns empty."""
    batch, heads, length = k.shape[:3]
    positions = (torch.arange(length) - padding).clamp(min=-1).expand(batch, heads, -1)
    angles = torch.arange(length)[:, None] * 0.3 ** torch.arange(rotary_dim // 2)
    rotary = tuple(torch.cat([x, x], -1)[None] for x in (angles.cos(), angles.sin()))
    counts = torch.full((batch,), length - padding)
    return CacheView(k, k, positions, counts, None, 1.0, None, None, here or site(), rotary=rotary)


def formula(k, scaling, alpha=1.0, beta=1.0, top_k=3, rotary_dim=DIM):
    """The factors of one head, ``k`` a list of tokens, from the definition, number by number."""
    half = rotary_dim // 2
    partner = [i + half if i < half else i - half if i < rotary_dim else i for i in range(len(k[0]))]
    norms = [
        max(abs(t[i]) if partner[i] == i else math.sqrt(t[i] ** 2 + t[partner[i]] ** 2) for t in k)
        for i in range(len(k[0]))
    ]
    sizes = [max(abs(t[i]) for t in k) for i in range(len(k[0]))]
    norms, sizes = ([max(x, 1e-3 * max(row)) for x in row] for row in (norms, sizes))
    largest = sorted(range(len(sizes)), key=lambda i: -sizes[i])[:top_k]
    outlying = {*largest, *(partner[i] for i in largest)} if scaling != "pre" else set()
    pre = [1.0 if scaling == "post" else alpha / x for x in norms]
    return [beta / sizes[i] if i in outlying else pre[i] for i in range(len(sizes))]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("rotary_dim", [8, 4, 2])
@pytest.mark.parametrize(
    "fields",
    [{}, {"scaling": "pre", "alpha": 8.0}, {"scaling": "post", "beta": 8.0, "top_k": 2}, {"top_k": 1, "beta": 4.0}],
)
def test_factors_against_the_formula(fields, rotary_dim, padding):
    k = vectors(2, HEADS, LENGTH, DIM) * torch.linspace(0.2, 5, DIM).roll(3)
    k[:, :, :padding] = math.nan
    k[0, 1, :, 6] = 0.0  # a channel that says nothing
    got = parse("fireq:" + ",".join(f"{n}={v}" for n, v in fields.items())).key_scale(view(k, rotary_dim, padding))
    assert got.shape == (2, HEADS, DIM)
    fields = {"scaling": "both", **fields}
    for b in range(2):
        for h in range(HEADS):
            want = formula(k[b, h, padding:].tolist(), rotary_dim=rotary_dim, **fields)
            assert is_close(got[b, h], torch.tensor(want), CLOSE), (b, h)
            alone = parse("fireq").key_scale(view(k[b : b + 1, h : h + 1], rotary_dim, padding))
            assert torch.equal(alone[0, 0], parse("fireq").key_scale(view(k, rotary_dim, padding))[b, h])


def test_control_of_the_formula():
    k = vectors(1, 1, LENGTH, DIM)
    got = parse("fireq:scaling=pre").key_scale(view(k))[0, 0]
    for wrong in (
        {"scaling": "both"},
        {"scaling": "post"},
        {"scaling": "pre", "rotary_dim": 4},
        {"scaling": "pre", "alpha": 1.1},
    ):
        assert is_far(got, torch.tensor(formula(k[0, 0].tolist(), **wrong)))


def test_scaled_pairs_have_norm_alpha_at_every_position():
    """The factors come from rotated keys, and hold for them at any other position: a pair keeps its norm."""
    k = vectors(1, HEADS, LENGTH, DIM) * torch.linspace(0.2, 5, DIM)
    seen = view(k)
    factors = parse("fireq:scaling=pre,alpha=2.0").key_scale(seen)
    for later in (k, rope.rotate(k, seen.rotary), rope.unrotate(k, seen.rotary)):
        top = rope.pair_norms(later * factors[:, :, None], DIM).amax(2)
        assert is_close(top, torch.full_like(top, 2.0), CLOSE)
    by_channel = 2.0 / k.abs().amax(2)  # what a channel reaches here does not bound it elsewhere
    top = (rope.rotate(k, seen.rotary) * by_channel[:, :, None]).abs().amax()
    assert float(top) > 2.5


def test_factors_are_positive_and_finite_whatever_comes():
    for k in (torch.zeros(1, 1, 3, DIM), vectors(1, 1, 1, DIM) * 1e-30, vectors(1, 1, 3, DIM) * 1e30):
        for scaling in ("pre", "post", "both"):
            factors = parse(f"fireq:scaling={scaling}").key_scale(view(k))
            assert bool(torch.isfinite(factors).all() and (factors > 0).all())
    silent = vectors(1, 1, 9, DIM)
    silent[..., 2] = silent[..., 6] = 0.0
    factors = parse("fireq:scaling=pre").key_scale(view(silent))[0, 0]
    assert float(factors.max() / factors.min()) < 1.01e3


def test_factors_of_a_long_prompt():
    """Looked at in blocks: the same as of the whole."""
    k = vectors(1, HEADS, 9000, DIM)
    k[0, 0, 8999], k[0, 1, 4096] = 50.0, -70.0
    got = parse("fireq:scaling=pre").key_scale(view(k))
    assert is_close(got, 1 / rope.pair_norms(k, DIM).amax(2), CLOSE)
    assert is_close(got[0, :, 0], 1 / torch.tensor([50.0, 70.0]) / math.sqrt(2), CLOSE)


def test_no_outliers_chosen_is_pre_alone_and_none_is_no_factor():
    seen = view(vectors(2, HEADS, LENGTH, DIM))
    assert torch.equal(parse("fireq:top_k=0").key_scale(seen), parse("fireq:scaling=pre").key_scale(seen))
    assert bool((parse("fireq:scaling=post,top_k=0").key_scale(seen) == 1).all())
    assert bool((parse("fireq:scaling=post,top_k=99").key_scale(seen) != 1).all())
    assert parse("fireq:scaling=none").key_scale(seen) is None


# --- exactness of the scaling in whole models, nothing quantised

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
                 "long_factor": [2.0, 2.5, 3.0, 3.5], "original_max_position_embeddings": 16},
}  # fmt: skip
FOLDED = [
    *[("llama", {"rope_parameters": rope_parameters}) for rope_parameters in ROPES.values()],
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {}),  # a bias on q and k
    ("qwen3", {}),  # norms on q and k
]


def fold(model, factors):
    """Multiply W_k and b_k (or the weight of the key's norm) by ``factors [Hkv, d]`` per layer; divide W_q."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, s in zip(model.model.layers, factors, strict=True):
        attention = layer.self_attn
        if hasattr(attention, "k_norm"):
            attention.k_norm.weight.mul_(s[0])
            attention.q_norm.weight.div_(s[0])
            continue
        for projection, by in ((attention.k_proj, s), (attention.q_proj, 1 / s.repeat_interleave(groups, 0))):
            projection.weight.mul_(by.reshape(-1, 1))
            if projection.bias is not None:
                projection.bias.mul_(by.reshape(-1))


def factors_of(model, ids, spec):
    """Factors of each layer ``[Hkv, d]``; one for all heads where the model has one norm for all."""
    views = looked(model, ids)
    if hasattr(model.model.layers[0].self_attn, "k_norm"):
        views = [view(v.k.flatten(1, 2)[:, None]) for v in views]
    return [parse(spec).key_scale(v)[0] for v in views]


@pytest.mark.parametrize(("name", "changes"), FOLDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_paired_factors_folded_into_the_weights_leave_the_model_as_it_was(name, changes, dtype):
    """The paper's own form: weights scaled before rotary positions. Unpaired factors are another model."""
    ids = models.tokens(1, 40)
    model = models.build(name, **changes).to(dtype)
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.q_proj):
            if projection.bias is not None:
                nn.init.normal_(projection.bias)
    with torch.no_grad():
        want = model(ids).logits
        paired = [s.to(dtype) for s in factors_of(model, ids, "fireq:scaling=pre")]
        assert all(float(s.max() / s.min()) > 1.1 for s in paired)
        fold(model, paired)
        scaled = model(ids).logits
        assert_close(scaled, want, within(dtype, 2 * MODEL))
        fold(model, [torch.cat([s[:, : DIM // 2] * 3, s[:, DIM // 2 :] / 3], -1) for s in paired])
        assert error(model(ids).logits, want) > 0.1


@pytest.mark.parametrize("scaling", ["pre", "post", "both"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "gemma2"])
def test_factors_at_the_attention_leave_every_model_as_it_was(name, scaling):
    """Our form: rotated keys times s, queries over s. Here no pairing is needed for exactness."""

    class Scale(AttentionEdit):
        def edit(self, call):
            s = parse(f"fireq:scaling={scaling}").key_scale(
                CacheView(call.k, call.v, torch.arange(call.k.shape[2]).expand(*call.k.shape[:2], -1),
                     torch.tensor([call.k.shape[2]]), None, 1.0, None, None, call.site, rotary=call.rotary)
            ).to(call.k.dtype)[:, :, None]  # fmt: skip
            return call.replace(k=call.k * s, q=call.q / s.repeat_interleave(call.q.shape[1] // s.shape[1], 1))

    class Half(Scale):
        def edit(self, call):
            return super().edit(call).replace(q=call.q)

    model, ids = models.build(name).double(), models.tokens(1, 24)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with manyheads.use(model, Scale()):
            assert_close(model(ids, use_cache=False).logits, want, FORMULA)
        with manyheads.use(model, Half()):
            assert error(model(ids, use_cache=False).logits, want) > 0.1


# --- composition, and what makes no sense


@pytest.mark.parametrize(
    "spec", ["fireq:window_tokens=4", "fireq:base=keydiff,budget=8,window_tokens=2,schedule=step,bits=fp8"]
)
def test_has_the_properties_of_a_cache(spec):
    model = models.tiny("llama", torch.float64)
    caches.batch_equals_singles_padded_left(model, spec)
    caches.batch_equals_singles_padded_right(model, spec)
    caches.beams_equal_singles(model, spec)
    caches.two_conversations(model, spec)
    caches.continues_where_it_was(model, spec)
    caches.on_means_on(model, spec)


@pytest.mark.parametrize("base", ["snapkv(window_size=4,kernel_size=3)", "keydiff", "graphkv(base=keydiff)"])
def test_keeps_what_the_base_keeps(base):
    """The same tokens as the base under the same protection; the older of them as codes."""
    model, ids, window = models.tiny("llama"), models.tokens(2, 40), 6
    slug, _, fields = base.partition("(")
    alone = f"{slug}({fields[:-1]},recent={window},budget=0.5)" if fields else f"{slug}(recent={window},budget=0.5)"
    with manyheads.use(model):
        want, got = (
            prefilled(model, alone, ids),
            prefilled(model, f"fireq:base={base},budget=0.5,window_tokens={window}", ids),
        )
        for a, b in zip(stores(want), stores(got), strict=True):
            columns = a.padded.columns()
            kept = {(i, h, t) for i in range(2) for h in range(2) for t in columns[i, h].tolist() if t >= 0}
            assert set(packed(b)) == {(i, h, t) for i, h, t in kept if t < 40 - window}
        assert got.bytes() < want.bytes()


def test_base_keeps_the_window_whole():
    assert parse("fireq:base=keydiff,budget=100").inner.recent == 64
    assert parse("fireq:base=snapkv,budget=100,window_tokens=8").inner.recent == 32
    with pytest.raises(UserError, match="64 protected"):
        parse("fireq:base=keydiff,budget=63")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("fireq:bits=int3", "int4"),
        ("fireq:scaling=some", "pre"),
        ("fireq:alpha=0", "alpha"),
        ("fireq:beta=-1", "beta"),
        ("fireq:top_k=-1", "top_k"),
        ("fireq:window_tokens=-1", "window_tokens"),
        ("fireq:budget=0.5", "base=snapkv"),
        ("fireq:base=hashevict", "hashevict"),
        ("fireq:base=snapkv(budget=0.3)", "outside"),
    ],
)
def test_refuses_what_makes_no_sense(spec, why):
    with pytest.raises(UserError, match=why):
        parse(spec)


def test_specs_are_read_back():
    for spec in ("fireq", "fireq:base=snapkv,budget=0.25", "fireq:bits=fp8,scaling=none,window_tokens=16"):
        assert parse(parse(spec).spec) == parse(spec)


def test_unknown_pairs_are_refused_by_name_and_can_be_left_unscaled():
    """GPT-2 has no rotary positions: there is nothing to pair, and plain INT4 is to be asked for."""
    model, ids = models.tiny("gpt2"), models.tokens(2, 20)
    with manyheads.use(model):
        with pytest.raises(UserError, match=r"scaling=none"):
            prefilled(model, "fireq:window_tokens=4", ids)
        cache = prefilled(model, "fireq:scaling=none,window_tokens=4", ids)
        assert all(len(packed(store)) == 2 * model.config.n_head * 16 for store in stores(cache))


def test_latents_are_refused_by_name():
    model = models.tiny("deepseek_v3")
    with manyheads.use(model), pytest.raises(UserError, match="latents"):
        prefilled(model, "fireq", models.tokens(1, 20))


def test_sliding_windows_stay_as_they_are():
    """Of Gemma 3's layers every full one is packed, and every sliding one as its base keeps it."""
    model, ids = models.tiny("gemma3_text"), models.tokens(2, 20)
    with manyheads.use(model):
        cache, full = prefilled(model, "fireq:window_tokens=4", ids), prefilled(model, "full", ids)
        assert {store.tokens.codec is None for store in stores(cache)} == {True, False}
        for got, want in zip(stores(cache), stores(full), strict=True):
            assert (got.tokens.codec is None) == (got.site.window is not None)
            if got.site.window is not None:
                assert torch.equal(got.keys, want.keys)


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_short_prompts_and_small_windows(length, window):
    """Also a window of none: every token encoded at once, as in the paper."""
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = prefilled(model, f"fireq:window_tokens={window}", models.tokens(1, length))
        for t in range(12):
            assert bool(torch.isfinite(step(model, models.tokens(1, 1, seed=t), cache)).all())
        assert cache.get_seq_length() == length + 12
        for store in stores(cache):
            assert sorted(packed(store)) == [(0, h, t) for h in range(2) for t in range(max(0, length + 12 - window))]
