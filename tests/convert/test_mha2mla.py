# SPDX-License-Identifier: Apache-2.0
"""MHA2MLA: the module is the formula, splitting heads loses nothing more, and stock DeepSeek loads the result."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import manyheads
from manyheads import UserError, parse
from manyheads.attention import mla
from manyheads.conversion import SurgeryPlan
from manyheads.convert.mha2mla import _svd
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.calibrate import calibrate
from manyheads.integrations.latent_attention import LatentAttention
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import FILE, load, plain, save
from manyheads.integrations.transformers import find_sites
from oracles.caches import greedy
from oracles.conversions import DIM, HEADS, KV, LAYERS, WIDTH, tiny
from tolerance import MODEL, assert_close, is_far, within

SAME = within(torch.float64, 4 * MODEL)
IDS = torch.arange(24).view(2, 12) * 7 % 61
HALF = "mha2mla:keep=0.5,rope=0.5"


@pytest.fixture(autouse=True)
def norms_of_float64(monkeypatch):
    """Norms that transformers computes in float32 whatever they are given, and so hide small differences."""

    def forward(norm, x):
        return x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight

    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def low_rank(model, rank):
    """The model with keys and values that are linear in ``rank`` directions of what attention reads."""
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            basis = torch.randn(rank, WIDTH, generator=source, dtype=torch.float64)
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.copy_(
                    torch.randn(len(part.weight), rank, generator=source, dtype=torch.float64) @ basis / 9
                )
    return model


def planned(model, spec):
    strategy, anatomy = parse(spec), ModelAnatomy(model)
    return strategy.plan(anatomy, calibrate(model, [IDS], strategy.wants(anatomy)))


def made(model, spec):
    return converted(model, planned(model, spec))


def logits(model, **more):
    with torch.no_grad():
        return model(IDS, **more).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_nothing_is_lost_where_all_turns_or_nothing_has_turned(kind):
    """With all pairs, values alone are in the latent; at position 0 no pair has turned, and any may be left out."""
    model = low_rank(tiny(kind), 10)
    assert_close(logits(made(model, "mha2mla:keep=0.8,rope=1")), logits(model), SAME)
    still = torch.zeros_like(IDS)
    for factors in ("joint", "split"):
        cut = made(model, f"mha2mla:keep=0.9,rope=0.25,factors={factors}")
        assert_close(logits(cut, position_ids=still), logits(model, position_ids=still), SAME)
        assert is_far(logits(cut), logits(model), SAME)
    small = made(model, "mha2mla:keep=0.3,rope=0.25")
    assert is_far(logits(small, position_ids=still), logits(model, position_ids=still), SAME)


@pytest.mark.parametrize("spec", [HALF, f"{HALF},select=uniform", f"{HALF},factors=split"])
def test_the_attention_is_that_of_the_formula(spec):
    """Float64, head by head, from the weights of the model before: rotated pairs and the rest, low rank together."""
    model, layer = tiny("llama"), 1
    step = planned(model, spec).steps[layer]
    module = converted(model, planned(model, spec)).model.layers[layer].self_attn
    source = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, WIDTH, generator=source, dtype=torch.float64)
    got = module(x, model.model.rotary_emb(x, torch.arange(9)[None]), None)[0]
    weights = {p: ModelAnatomy(model).weight(p, layer) for p in "qkvo"}
    rank, pairs = step.config["rank"], step.config["pairs"]
    q, k, v = ((x[0] @ weights[p].T).unflatten(1, (-1, DIM)) for p in "qkv")
    kept = [[c for j in own for c in (j, j + DIM // 2)] for own in pairs]
    rest = [[c for c in range(DIM) if c not in own] for own in kept]
    w_c = torch.cat([weights["k"].view(KV, DIM, -1)[g, rest[g]] for g in range(KV)])
    if "split" in spec:
        low = [_truncated(w, r) for w, r in ((w_c, rank // 2), (weights["v"], rank - rank // 2))]
    else:
        low = _truncated(torch.cat([w_c, weights["v"]]), rank).split([len(w_c), KV * DIM])
    k_c, v = ((x[0] @ w.T).unflatten(1, (KV, -1)) for w in low)
    angles = torch.arange(9)[:, None] * model.model.rotary_emb.inv_freq.double()
    out = torch.zeros(9, HEADS, DIM, dtype=torch.float64)
    for h in range(HEADS):
        g, score = h * KV // HEADS, torch.zeros(9, 9, dtype=torch.float64)
        score += q[:, h, rest[g]] @ k_c[:, g].T
        for j in pairs[g]:
            turn = torch.polar(torch.ones_like(angles[:, j]), angles[:, j])
            a, b = (torch.complex(y[:, j], y[:, j + DIM // 2]) * turn for y in (q[:, h], k[:, g]))
            score += (a[:, None] * b.conj()).real
        score = (score / math.sqrt(DIM)).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        out[:, h] = score.softmax(-1) @ v[:, g]
    want = out.flatten(1) @ weights["o"].T
    assert_close(got[0], want, 1e-6)  # rotary frequencies of the model are float32
    assert is_far(got[0].flip(0), want, 1e-6)


def _truncated(w, rank):
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 9), more=st.integers(1, 9), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_one_svd_loses_what_it_drops_and_no_more_than_two(rows, more, rank, seed):
    """Eckart-Young: the squared error is that of the singular values that go, and no split of the rank beats it."""
    w = torch.randn(rows + more, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    up, down = _svd(w, rank)
    assert up.shape[1] == len(down) == rank
    error = (w - up @ down).square().sum()
    assert_close(error, torch.linalg.svdvals(w)[rank:].square().sum(), 1e-9, unit=float(w.norm() ** 2))
    for first in range(rank + 1):
        parts = zip(w.split([rows, more]), (first, rank - first), strict=True)
        apart = sum((part - torch.matmul(*_svd(part, r))).square().sum() for part, r in parts)
        assert error <= apart + 1e-9


def test_pairs_are_chosen_by_the_product_of_norms():
    model = tiny("llama")
    anatomy, layer = ModelAnatomy(model), model.model.layers[1]
    inputs = []
    handle = layer.self_attn.q_proj.register_forward_hook(lambda _, args, out: inputs.append(args[0][..., :]))
    logits(model)
    handle.remove()
    norms = {
        part: (inputs[0] @ anatomy.weight(part, 1).T).unflatten(-1, (-1, 2, DIM // 2)).norm(dim=-2).mean((0, 1))
        for part in "qk"
    }
    score = norms["q"].unflatten(0, (KV, -1)).mean(1) * norms["k"]
    chosen = planned(model, HALF).steps[1].config["pairs"]
    assert chosen == score.topk(2, -1).indices.sort(-1).values.tolist()
    assert chosen != norms["q"].unflatten(0, (KV, -1)).mean(1).topk(2, -1).indices.sort(-1).values.tolist()
    alike = planned(model, f"{HALF},same=true").steps
    assert [step.config["pairs"] for step in alike] == LAYERS * [
        _pairs_of_all(model).topk(2, -1).indices.sort(-1).values.tolist()
    ]
    with torch.no_grad():  # a scale that keys take from queries, pair by pair, changes no choice
        scale = torch.rand(KV, 1, DIM // 2, dtype=torch.float64) + 0.5
        for part, by in (("k_proj", scale), ("q_proj", 1 / scale.repeat_interleave(HEADS // KV, 0))):
            weight = getattr(layer.self_attn, part).weight
            weight.copy_((weight.unflatten(0, (-1, 2, DIM // 2)) * by[..., None]).flatten(0, 2))
    assert planned(model, HALF).steps[1].config["pairs"] == chosen


def _pairs_of_all(model):
    """The sum over layers of the product of norms, ``[G, d / 2]``."""
    strategy = parse(HALF)
    stats = calibrate(model, [IDS], strategy.wants(ModelAnatomy(model)))
    total = 0
    for norms in stats.values["attention.pair_norms"]:
        total = total + norms[:HEADS].unflatten(0, (KV, -1)).mean(1) * norms[HEADS:]
    return total


def test_pairs_by_frequency():
    model = tiny("llama")
    for select, want in {"high": [0, 1], "low": [2, 3], "uniform": [0, 2]}.items():
        steps = planned(model, f"{HALF},select={select}").steps
        assert [step.config["pairs"] for step in steps] == [[want] * KV] * LAYERS
    alike = planned(model, f"{HALF},same=true").steps
    assert all(step.config["pairs"] == alike[0].config["pairs"] for step in alike)


@pytest.mark.parametrize(
    ("spec", "size"), [("mha2mla", 14), (HALF, 24), (f"{HALF},factors=split", 24), ("mha2mla:keep=1", 48)]
)
def test_the_cache_is_as_large_as_asked_for(spec, size):
    """Of 48 numbers a token and layer; whole pairs, and an even number of channels in a latent."""
    cut, cache = made(tiny("llama"), spec), DynamicCache()
    logits(cut, past_key_values=cache, use_cache=True)
    held = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values)) / IDS.numel() / LAYERS
    assert held == size <= 48 * parse(spec).keep


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_decoding_absorbed_is_decoding(kind):
    cut = made(tiny(kind), HALF)
    assert all(site.latent is not None for site, _ in find_sites(cut))
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    tokens, want = greedy(cut, IDS, mask)
    calls, absorb = [], mla.absorb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla, "absorb", lambda *a, **k: calls.append(1) or absorb(*a, **k))
        with manyheads.use(cut, "mla_hw:schedule=absorb"):
            _, got = greedy(cut, IDS, mask, forced=tokens)
    assert_close(got, want, SAME)
    assert len(calls) == LAYERS * 7


@pytest.mark.parametrize(
    ("kind", "spec", "stock"),
    [
        ("llama", f"{HALF},same=true", True), ("llama", f"{HALF},select=high", True), ("llama", HALF, False),
        ("qwen2", f"{HALF},same=true", False), ("llama", "kv_merging", True), ("qwen2", "kv_merging", True),
    ],
)  # fmt: skip
def test_files_give_the_model_again(kind, spec, stock, tmp_path):
    model = tiny(kind, tie_word_embeddings=True)
    plan = planned(model, spec)
    cut = converted(model, plan)
    assert sum(p.numel() for p in cut.parameters()) == ModelAnatomy(model).parameters(plan)
    assert SurgeryPlan.of(plan.plain()).plain() == plan.plain()
    assert save(cut, tmp_path, plan, model.config, {}) == stock
    assert (tmp_path / FILE).is_file() != stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64) if stock else load(tmp_path)
    assert_close(logits(again), logits(cut), 1e-5)  # a norm over latents that divides by a constant, nearly
    assert isinstance(again, DeepseekV3ForCausalLM) == (stock and "mha2mla" in spec)
    tokens, want = greedy(cut, IDS)
    assert_close(greedy(again, IDS, forced=tokens)[1], want, 1e-5)


def test_a_stock_checkpoint_is_made_in_float32_and_is_absorbed(tmp_path):
    """Half precision is rounded once more, as weights are scaled; its cache is one channel, or two, larger."""
    model = tiny("llama").bfloat16()
    plan = planned(model, f"{HALF},same=true")
    assert save(converted(model, plan), tmp_path, plan, model.config, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and again.config.kv_lora_rank == plan.steps[0].config["rank"] + 2
    wide = again.float()
    tokens, want = greedy(wide, IDS)
    with manyheads.use(wide, "mla_hw:schedule=absorb"):
        assert_close(greedy(wide, IDS, forced=tokens)[1], want, 1e-5)


def test_a_window_is_not_forgotten():
    """DeepSeek has none, and on a short text nothing would show it."""
    cut = made(tiny("llama"), f"{HALF},same=true")
    assert plain(cut) is not None
    cut.config.sliding_window = 64
    assert plain(cut) is None


def test_merged_heads_are_means_and_equal_heads_lose_nothing():
    model = tiny("llama")
    merged = made(model, "kv_merging").model.layers[0].self_attn.k_proj.weight
    assert_close(merged, model.model.layers[0].self_attn.k_proj.weight.view(KV, DIM, -1).mean(0), SAME)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.copy_(part.weight[:DIM].repeat(KV, 1))
    assert_close(logits(made(model, "kv_merging")), logits(model), SAME)


def test_recovery_trains_it():
    from manyheads.converter import Material, convert_model

    model = tiny("llama").float()
    ids = (torch.arange(600) * 7 + torch.arange(600) // 61) % 61
    material = Material(ids, ids[:26].view(2, 13), 12)
    for spec in (HALF, "kv_merging"):
        losses = convert_model(model, f"{spec}{',' if ':' in spec else ':'}lr=0.01", material, recover=20).losses
        assert losses["after recovery"] < losses["after surgery"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mha2mla:keep=2", "shares above 0"), ("mha2mla:select=all", "2-norm"), ("mha2mla:lr=0", "above 0"),
        ("mha2mla:keep=0.1", "keep 0.167"), ("kv_merging:heads=2", "take 1"), ("kv_merging:heads=0", "from 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(spec, said):
    with pytest.raises(UserError, match=said):
        planned(tiny("llama"), spec)


def test_models_whose_keys_are_normed_are_refused():
    with pytest.raises(UserError, match="keys of qwen3 models"):
        planned(tiny("qwen3"), "mha2mla")


def test_the_module_is_the_attention_of_its_model():
    cut = made(tiny("llama"), HALF)
    modules = [m for m in cut.modules() if isinstance(m, LatentAttention)]
    assert [m.layer_idx for m in modules] == list(range(LAYERS)) and all(m.config is cut.config for m in modules)
