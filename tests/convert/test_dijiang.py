# SPDX-License-Identifier: Apache-2.0
"""DiJiang: its maps are the formulas, the module is a double sum over tokens, and no length overflows."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn
from transformers import DynamicCache

from manyheads import UserError, parse
from manyheads.attention.feature_maps import FeatureMap, KernelAttention, dct_matrix, radii, retention_decay
from manyheads.calls.calibration import Statistics
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.kernel_attention import StateLayer
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import load, save
from oracles import mixers
from oracles.caches import greedy
from oracles.conversions import DIM, HEADS, KV, LAYERS, tiny
from tolerance import DEEP, FORMULA, assert_close, error, is_far

SPECS = [
    "dijiang",
    "dijiang:features=dct,decay=true,norm=group",
    "dijiang:features=favor,decay=true",
    "dijiang:features=elu",
]
IDS = torch.arange(24).view(2, 12) * 7 % 61


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(model, spec):
    return converted(model, parse(spec).plan(ModelAnatomy(model), Statistics({})))


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def test_the_transform_is_orthonormal_and_its_rows_are_frequencies():
    c = dct_matrix(16)
    assert_close(c @ c.T, torch.eye(16, dtype=torch.float64), FORMULA, unit=1)
    j = torch.arange(16, dtype=torch.float64)
    assert_close(c[3], torch.cos(math.pi * (2 * j + 1) * 3 / 32) / math.sqrt(8), FORMULA)
    assert_close(c[0], torch.full((16,), 0.25, dtype=torch.float64), FORMULA)


@pytest.mark.parametrize("kind", ["wdct", "dct"])
def test_features_are_the_formula(kind):
    x, source = drawn(3, 16), torch.Generator().manual_seed(5)
    t = torch.from_numpy(norm.ppf(torch.rand(16, generator=source, dtype=torch.float64).numpy()))
    features = FeatureMap(kind, 16, seed=5).double()
    if kind == "dct":
        want = (t * (x @ dct_matrix(16).T)).softmax(-1)
        assert_close(want.sum(-1), torch.ones(3), FORMULA)
    else:
        weight = drawn(16, seed=2)
        features.weight.data.copy_(weight)
        x_ = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() / 2
        want = weight * (t * (x_ @ dct_matrix(16).T)).exp()
    assert_close(features(x), want, 1e-6)  # directions are kept in float32
    assert is_far(FeatureMap(kind, 16, seed=6).double()(x), want, 1e-6)


@pytest.mark.parametrize("kind", ["wdct", "dct", "favor", "elu"])
def test_features_are_positive_and_finite_at_any_scale(kind):
    for scale in (0.0, 1e-4, 1.0, 1e4):
        found = FeatureMap(kind, 64)(scale * drawn(50, 64).float())
        assert torch.isfinite(found).all() and (found >= 0).all() and found.sum(-1).min() > 0


def test_the_kernel_is_without_bias_with_chi_lengths_alone():
    """Mean over features of exp(t v x) exp(t v y) exp(-(|x|^2 + |y|^2) / 2) is exp(x y), v uniform on the sphere."""
    dim, count, source = 8, 200_000, torch.Generator().manual_seed(0)
    x, y = (0.5 * drawn(dim, seed=i) for i in (1, 2))
    v = nn.functional.normalize(torch.randn(count, dim, generator=source, dtype=torch.float64), dim=-1)
    want = torch.exp(x @ y)
    found = {}
    for radial in ("chi", "normal"):
        w = v * radii(count, dim, radial, source)[:, None]
        values = torch.exp(w @ (x + y) - (x @ x + y @ y) / 2)
        found[radial] = values.mean(), values.std() / count**0.5
    assert abs(found["chi"][0] - want) < 4 * found["chi"][1]
    assert abs(found["normal"][0] - want) > 40 * found["normal"][1]


def formula(inner, q, k, v, times=1):
    """A double sum over tokens; ``times`` makes heads forget faster (wrong unless 1)."""
    size = q.shape[1] // k.shape[1]
    weights = inner.map(q) @ inner.map(k).repeat_interleave(size, 1).mT
    apart = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    if inner.decay is not None:
        weights = weights * torch.exp(times * inner.decay.repeat_interleave(size)[:, None, None] * apart)
    weights = weights * (apart >= 0)
    out = weights @ v.repeat_interleave(size, 1)
    if inner.norm is None:
        return (out / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + inner.norm.eps).sqrt()
    return out.transpose(1, 2).flatten(2) * inner.norm.weight + inner.norm.bias


@pytest.mark.parametrize("spec", SPECS)
def test_attention_is_the_double_sum(spec):
    s = parse(spec)
    inner = mixers.scattered(KernelAttention(4, 2, 8, s.features, decay=s.decay, norm=s.norm))
    q, k, v = (drawn(2, n, 150, 8, seed=i) for i, n in enumerate((4, 2, 2)))
    got, want = inner(q, k, v)[0], formula(inner, q, k, v)
    assert_close(got, want, 1e-5)  # the sum has 1e-6 added to it
    if s.decay:
        assert is_far(formula(inner, q, k, v, times=2), want, 1e-3)
    assert is_far(formula(inner, q, k.flip(2), v), want, 1e-3)


def test_decay_is_retnets_and_no_length_overflows():
    """gamma^-n of the released code is infinite past 2,790 tokens; the recurrence forgets, and what it says stays."""
    g = retention_decay(4)
    assert_close(g.double().exp(), 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), 4)).double(), 1e-6)
    assert torch.isinf(torch.exp(-g[0] * 4096)) and torch.isfinite(torch.exp(-g[0] * 2780))
    inner = KernelAttention(4, 4, 8, "dct", decay=True, norm="group")
    q, k, v = (drawn(1, 4, 4096, 8, seed=i).float() for i in range(3))
    with torch.no_grad():
        long = inner(q, k, v)[0]
        late = inner(*(x[:, :, 2048:] for x in (q, k, v)))[0]
    assert torch.isfinite(long).all()
    fast = slice(0, 8)  # of the head that forgets fastest nothing is left of 2,048 tokens before
    assert_close(long[:, -1, fast], late[:, -1, fast], 1e-4)
    assert error(long[:, 2048, fast], late[:, 0, fast]) > 0.1  # and what was there before did count


@pytest.mark.parametrize("spec", SPECS)
def test_gradients(spec):
    mixers.gradients_are_right(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_the_converted_layer_is_the_formula(spec):
    model = tiny("llama")
    cut = made(model, spec)
    module = mixers.scattered(cut.model.layers[1].self_attn)
    x = drawn(1, 20, 48)
    cos, sin = model.model.rotary_emb(x, torch.arange(20)[None])

    def turned(y):
        a, b = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    q, k, v = (
        part(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = formula(module.inner, turned(q), turned(k), v)
    want = module.o_proj(out if module.gate is None else out * nn.functional.silu(module.gate(x)))
    assert (q.shape[1], k.shape[1]) == (HEADS, KV)
    assert_close(module(x, (cos, sin))[0], want, 1e-5)
    assert (module.gate is not None) == ("group" in spec)


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_decodes_and_does_not_grow(spec):
    cut = made(tiny("llama"), spec)
    want = logits(cut)
    cache, sizes = DynamicCache(config=cut.config), set()
    parts = []
    for piece in IDS.split([5, 1, 3, 1, 1, 1], 1):
        parts.append(logits(cut, piece, past_key_values=cache, use_cache=True))
        assert all(isinstance(layer, StateLayer) for layer in cache.layers) and len(cache.layers) == LAYERS
        sizes.add(sum(layer.state.nbytes for layer in cache.layers))
    assert_close(torch.cat(parts, 1), want, 1e-6)  # norms of the model are float32
    assert len(sizes) == 1 and cache.get_seq_length() == 12
    with pytest.raises(UserError, match="read the text anew"):
        cache.crop(-2)


@pytest.mark.parametrize("spec", SPECS[:2])
def test_it_generates_padded_and_with_beams(spec):
    cut = made(tiny("llama"), spec)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    _, both = greedy(cut, IDS, mask, count=4)
    _, alone = greedy(cut, IDS[:1, 5:], count=4, forced=greedy(cut, IDS, mask, count=4)[0][:1])
    assert_close(both[:1], alone, 1e-5)
    beams = cut.generate(input_ids=IDS, attention_mask=mask, num_beams=3, max_new_tokens=5, do_sample=False)
    single = cut.generate(input_ids=IDS[:1, 5:], num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(beams[:1, 12:], single[:, 7:])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("spec", SPECS[:2])
def test_files_give_the_model_again(kind, spec, tmp_path):
    model = tiny(kind)
    plan = parse(spec).plan(ModelAnatomy(model), Statistics({}))
    cut = converted(model, plan)
    assert sum(p.numel() for p in cut.parameters()) == ModelAnatomy(model).parameters(plan)
    assert not save(cut, tmp_path, plan, model.config, {})
    assert_close(logits(load(tmp_path)), logits(cut), DEEP)
    layer, before = cut.model.layers[0].self_attn, model.model.layers[0].self_attn
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        own, theirs = getattr(layer, part), getattr(before, part)
        assert torch.equal(own.weight, theirs.weight)
        assert theirs.bias is None if own.bias is None else torch.equal(own.bias, theirs.bias)
    assert (before.k_proj.bias is not None) == (kind == "qwen2")


def test_draws_are_those_of_the_seed_and_the_lengths_asked_for():
    for fields in ("seed=3", "radial=chi", "seed=1,radial=chi"):
        asked = parse(f"dijiang:{fields}")
        found = made(tiny("llama"), f"dijiang:{fields}").model.layers[1].self_attn.inner.map.directions
        want = FeatureMap("wdct", DIM, asked.radial, asked.seed).directions
        assert_close(found.float(), want, FORMULA)
        assert is_far(found.float(), FeatureMap("wdct", DIM).directions, 0.1)


def test_recovery_trains_it():
    from manyheads.converter import Material, convert_model

    model = tiny("llama").float()
    ids = (torch.arange(600) * 7 + torch.arange(600) // 61) % 61
    material = Material(ids, ids[:26].view(2, 13), 12)
    losses = convert_model(model, "dijiang:lr=0.01", material, recover=20).losses
    assert losses["after recovery"] < losses["after surgery"]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="keys of qwen3 models"):
        made(tiny("qwen3"), "dijiang")
    windowed = tiny("llama")
    windowed.config.sliding_window = 4
    with pytest.raises(UserError, match="window"):
        made(windowed, "dijiang")
    with pytest.raises(UserError, match="above 0"):
        parse("dijiang:lr=0")
