# SPDX-License-Identifier: Apache-2.0
"""Latent caches that are never expanded: the same output as the untouched model, for less work."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import manyheads
from integrations.test_latent import LATENT, PRESENT, build
from manyheads import UserError, parse
from manyheads.attention import mla, reference
from manyheads.caches.mla_hw import LatentStore, MLAHw
from manyheads.call import AttentionCall
from manyheads.integrations.transformers import find_sites, new_cache
from manyheads.strategy import AttentionWatch
from oracles import caches, models
from oracles.caches import greedy, prefilled, step, stores
from oracles.models import tokens
from oracles.strategies import Watch
from tolerance import BYTES, CLOSE, GRADIENT, HALF_FACTOR, SAME, assert_close, error

ABSORB, EXPAND = "mla_hw:schedule=absorb", "mla_hw:schedule=expand"
each = pytest.mark.parametrize("spec", [ABSORB, EXPAND])


@pytest.fixture
def model():
    return models.tiny("deepseek_v3")


def paddings():
    """A left-padded batch with its mask."""
    ids, mask = tokens(3, 17, seed=99), torch.ones(3, 17, dtype=torch.long)
    mask[1, :13], mask[2, :6] = 0, 0
    return ids, mask


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PRESENT)
@each
def test_generates_what_the_model_generates(name, spec, attn):
    """Every architecture that caches latents, a padded batch: the logits along the tokens of the model."""
    untouched = build(name, attn_implementation=attn)
    ids, mask = paddings()
    made, want = greedy(untouched, ids, mask)
    with manyheads.use(untouched, spec):
        _, got = greedy(untouched, ids, mask, forced=made)
    assert_close(got, want, SAME)


@each
def test_batches_paddings_and_beams(spec):
    model = models.tiny("deepseek_v3", torch.float64)
    caches.batch_equals_singles_padded_left(model, spec)
    caches.batch_equals_singles_padded_right(model, spec)
    caches.beams_equal_singles(model, spec)


@each
def test_conversations_and_rows(model, spec):
    caches.two_conversations(model, spec)
    caches.rows_can_be_rearranged(model, spec)
    caches.continues_where_it_was(model, spec)


@dataclass(frozen=True, kw_only=True)
class Wrong(MLAHw):
    """``MLAHw`` with a store that is wrong."""

    how: type[LatentStore] = LatentStore

    def store(self, site):
        return self.how(self, site)


class Unmasked(LatentStore):
    def _mask(self, call):
        return None


class Unpositioned(LatentStore):
    def update(self, k, v):
        return super().update(k, torch.zeros_like(v))


class Stuck(LatentStore):
    def reorder(self, rows):
        if len(rows) != len(self.keys):
            super().reorder(rows)


def test_controls(model):
    """A store that ignores the mask, the rotary keys or the beams is found out."""
    for how in (Unmasked, Unpositioned):
        ids, mask = paddings()
        _, want = greedy(model, ids, mask)
        with manyheads.use(model, Wrong(schedule="absorb", how=how)):
            assert error(greedy(model, ids, mask)[1], want) > 1e-2
    with pytest.raises(AssertionError):
        caches.batch_equals_singles_padded_left(model, Wrong(schedule="absorb", how=Unmasked))
    with pytest.raises(AssertionError):
        caches.rows_can_be_rearranged(model, Wrong(schedule="absorb", how=Stuck))


@each
@pytest.mark.parametrize("cuts", [(17,), (5, 12), (1,) * 17, (9, 1, 7)])
def test_chunks_equal_one_shot(model, spec, cuts):
    """A prompt in pieces gives the logits of the plain model in one piece, padded rows too."""
    ids, mask = paddings()
    real, at, parts = mask.bool(), 0, []
    with manyheads.use(model):
        cache = new_cache(model, parse(spec))
        for n in cuts:
            parts.append(step(model, ids[:, at : at + n], cache, attention_mask=mask[:, : at + n],
                              position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, at : at + n]))  # fmt: skip
            at += n
    with torch.no_grad():
        want = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert_close(torch.cat(parts, 1)[real], want[real])


def test_the_first_forward_is_the_models_own(model):
    ids, mask = paddings()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
    with manyheads.use(model, ABSORB), torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, want)


def test_decoding_expands_nothing(model):
    """The up-projection sees the new token only, and a step costs what the model of costs says."""
    seen = []
    hooks = [m.kv_b_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[2])) for m in _modules(model)]
    flops = {}
    try:
        for spec in (None, ABSORB):
            with manyheads.use(model):
                cache = prefilled(model, spec or "full", tokens(2, 24))
                seen.clear()
                with FlopCounterMode(display=False) as counted:
                    step(model, tokens(2, 1), cache)
            flops[spec] = counted.get_total_flops()
            assert seen == ([25, 25] if spec is None else [1, 1])
    finally:
        for hook in hooks:
            hook.remove()
    site = find_sites(model)[0][0]
    dims = LatentStore(parse(ABSORB), site).dims
    cost = {"expand": 25, "absorb": 32}  # tokens; logits are made in sixteens
    expanding, absorbing = (sum(s.flops for s in mla.mla_cost(way, dims, 2, 1, n, 4)) for way, n in cost.items())
    up = 2 * 2 * dims.rank * dims.num_heads * (dims.nope_dim + dims.v_dim)  # the module expands its new token
    assert flops[ABSORB] - flops[None] == 2 * (absorbing + up - expanding) < 0


def _modules(model):
    return [module for _, module in find_sites(model)]


def test_auto_follows_the_platform(model, monkeypatch):
    """Few queries absorb and many expand; on hardware where bytes are free and FLOPs dear the border is the formula."""
    chosen = []

    def spy(self, call):
        chosen.append((call.q.shape[2], own(self, call)))
        return chosen[-1][1]

    own = LatentStore._schedule
    monkeypatch.setattr(LatentStore, "_schedule", spy)
    slow = "mla_hw:peak_tflops=0.000001,bandwidth_gbs=1000000"
    wide = build("DeepseekV3", kv_lora_rank=64)
    store = stores(new_cache(wide, parse(slow)))[0]
    border = mla.crossover(store.dims, 256)
    assert 4 < border < 60
    with manyheads.use(wide):
        cache = prefilled(wide, slow, tokens(1, 100))
        for n in (1, 2, int(border), int(border) + 2, 60):
            chosen.clear()
            step(wide, tokens(1, n), cache)
            assert chosen == [(n, "absorb" if n <= border else "expand")] * 2


def test_auto_knows_its_device():
    auto, cpu = parse("mla_hw"), torch.device("cpu")
    assert auto.platform(cpu, 4) == mla.platform_of("cpu", 4)
    own = parse("mla_hw:peak_tflops=2,bandwidth_gbs=300").platform(cpu, 2)
    assert (own.peak_flops, own.bandwidth, own.overhead) == (2e12, 3e11, mla.platform_of("cpu").overhead)
    other = torch.device("mps")
    assert parse("mla_hw:peak_tflops=2,bandwidth_gbs=300").platform(other, 2).peak_flops == 2e12
    with pytest.raises(UserError, match="give peak_tflops and bandwidth_gbs"):
        parse("mla_hw:peak_tflops=2").platform(other, 2)


def test_bytes_are_those_held(model):
    """One tensor per layer that grows by 256 tokens: as small as the model's own cache, and reported as it is."""
    with manyheads.use(model):
        cache = prefilled(model, ABSORB, tokens(2, 24))
        assert abs(cache.bytes() - caches.held(cache)) <= BYTES * caches.held(cache)
        size = cache.bytes()
        assert size == 2 * 2 * 256 * (16 + 8) * 4  # layers, rows, tokens, channels, bytes
        places = [s.keys.data_ptr() for s in stores(cache)]
        for t in range(4):
            step(model, tokens(2, 1, seed=t), cache)
        assert cache.bytes() == size and [s.keys.data_ptr() for s in stores(cache)] == places
        step(model, tokens(2, 250), cache)
        assert cache.bytes() == 2 * size and stores(cache)[0].seen == 278
        assert stores(cache)[0].keys.shape == (2, 1, 278, 16) and stores(cache)[0].values.shape == (2, 1, 278, 8)
        for store in stores(cache):
            store.reset()
        assert cache.bytes() == 0


@each
def test_crop_is_as_if_never_come(model, spec):
    with manyheads.use(model):
        cache, direct = (prefilled(model, spec, tokens(2, 24)) for _ in range(2))
        for _ in range(2):
            step(model, tokens(2, 3, seed=3), cache)
            cache.crop(-3)
        for t in range(3):
            last = tokens(2, 1, seed=40 + t)
            assert torch.equal(step(model, last, cache), step(model, last, direct))
        cache.crop(-27)
        assert cache.get_seq_length() == 0
        assert torch.equal(step(model, tokens(2, 24), cache), step(model, tokens(2, 24), new_cache(model, parse(spec))))


def test_prompt_lookup_crops():
    model = models.tiny("deepseek_v3", torch.float64)
    ids = tokens(1, 6).repeat(1, 4)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    with manyheads.use(model, ABSORB):
        got = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(got, want)


def test_unused_room_is_never_read(model):
    """Huge numbers after the last token, and NaN from where logits are not even made."""
    with manyheads.use(model):
        cache, clean = (prefilled(model, ABSORB, tokens(2, 24)) for _ in range(2))
        for store in stores(cache):
            store._held[:, :, store.seen :] = caches.HUGE
            store._held[:, :, 32:] = torch.nan
        for n in (1, 3):
            assert torch.equal(step(model, tokens(2, n), cache), step(model, tokens(2, n), clean))


def test_every_token_matters(model):
    ids, mask = paddings()
    more, last = torch.cat([mask, mask.new_ones(3, 1)], 1), tokens(3, 1, seed=5)
    with manyheads.use(model):
        cache = prefilled(model, ABSORB, ids, attention_mask=mask)
        plain = step(model, last, copy.deepcopy(cache), attention_mask=more)
        for layer in range(2):
            for row, column in ((0, 0), (0, 16), (1, 13), (1, 12), (2, 5), (2, 6)):
                changed = copy.deepcopy(cache)
                stores(changed)[layer]._held[row, :, column] += 100
                moved = (step(model, last, changed, attention_mask=more) - plain).abs().amax((1, 2))
                assert bool(moved[row] > 1e-3) == bool(mask[row, column])
                assert bool((moved[[i for i in range(3) if i != row]] < 1e-3).all())


class Full(AttentionWatch):
    """Reads keys and values as another strategy sees them."""

    def watch(self, call, out):
        call.state.setdefault("seen", []).append((call, out))


def test_another_strategy_sees_all_keys(model):
    """Beside a watch the call holds keys and values of every token, and the output is what they give."""
    note, ids = Full(), tokens(2, 20)
    made, want = greedy(model, ids)
    with manyheads.use(model, ABSORB, note) as port:
        _, got = greedy(model, ids, forced=made)
    assert_close(got, want, CLOSE)
    for site in port.state(note).values():
        assert [c.k.shape[2] for c, _ in site["seen"]] == list(range(20, 28))
        for call, out in site["seen"]:
            assert_close(call.attend(), out, CLOSE)
    with manyheads.use(model, ABSORB, Watch()):
        assert_close(greedy(model, ids, forced=made)[1], want, CLOSE)


@pytest.mark.parametrize("shape", [(2, 1, 1, 30), (2, 1, 4, 30), (1, 4, 3, 9)])
def test_user_bias_and_causality_without_a_mask(model, shape):
    """By hand: an additive bias, and ``is_causal`` over a cache, which the port never sends, are right too."""
    batch, heads, new, seen = shape
    site = find_sites(model)[0][0]
    store, old = LatentStore(parse(ABSORB), site), seen - new
    dims = store.dims
    latents, rope = torch.randn(batch, 1, seen, dims.rank), torch.randn(batch, 1, seen, dims.rope_dim)
    store.update(latents[:, :, :old], rope[:, :, :old])
    fresh = store.update(latents[:, :, old:], rope[:, :, old:])
    assert torch.equal(fresh[0], latents[:, :, old:]) and torch.equal(fresh[1], rope[:, :, old:])
    q = torch.randn(batch, dims.num_heads, new, dims.nope_dim + dims.rope_dim)
    k, v = _modules(model)[0].expand_kv(latents, rope)
    bias = torch.randn(batch, heads, new, seen)
    call = AttentionCall(site, q, k[:, :, old:], v[:, :, old:], 0.3, bias=bias, is_causal=new > 1)
    want = reference.attention(q, k, v, scale=0.3, bias=bias, is_causal=new > 1)
    assert_close(store.attend(call), want)
    whole = store.mask(call)
    assert_close(whole.attend(), want, CLOSE)
    assert whole.k.shape[2] == seen and not whole.is_causal


def test_half_precision_is_no_worse_than_expanding():
    """bfloat16 and float16 logits against float64: within twice the error of the untouched model."""
    for dtype in (torch.bfloat16, torch.float16):
        truth, half = build("Youtu").double(), build("Youtu").to(dtype)
        truth.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
        ids, errors = tokens(2, 40), {}
        with manyheads.use(truth), manyheads.use(half):
            for spec in ("full", ABSORB):
                exact, rounded = prefilled(truth, "full", ids), prefilled(half, spec, ids)
                want, got = (torch.cat([step(m, tokens(2, 1, seed=t), c) for t in range(6)], 1)
                             for m, c in ((truth, exact), (half, rounded)))  # fmt: skip
                errors[spec] = error(got, want)
        assert errors[ABSORB] <= HALF_FACTOR * errors["full"], errors


def test_gradients_reach_through_the_cache():
    """Two chunks in training mode: the gradients of every parameter are those of transformers' own cache."""
    own, found = build("Youtu").requires_grad_(True), {}
    for spec in ("full", ABSORB, EXPAND):
        with manyheads.use(own):
            cache = new_cache(own, parse(spec))
            own(tokens(2, 10), past_key_values=cache)
            own(tokens(2, 9, seed=1), past_key_values=cache).logits.pow(2).mean().backward()
        found[spec] = [parameter.grad.clone() for parameter in own.parameters()]
        own.zero_grad()
    for spec in (ABSORB, EXPAND):
        for got, want in zip(found[spec], found["full"], strict=True):
            assert_close(got, want, GRADIENT)


def test_new_weights_count_at_once():
    own = build("Youtu")
    with manyheads.use(own):
        cache, plain = prefilled(own, ABSORB, tokens(1, 9)), prefilled(own, "full", tokens(1, 9))
        for module in _modules(own):
            module.kv_b_proj.weight.mul_(1.5)
        assert_close(step(own, tokens(1, 1), cache), step(own, tokens(1, 1), plain), CLOSE)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mla_hw:schedule=reuse", "absorb"),
        ("mla_hw:peak_tflops=0", "positive"),
        ("mla_hw:bandwidth_gbs=-1", "positive"),
        ("mla_hw:budget=0.5", "no field 'budget'"),
    ],
)
def test_refuses_fields(spec, reason):
    with pytest.raises(UserError, match=reason):
        parse(spec)


def test_refuses_models_without_latents(model):
    with pytest.raises(UserError, match="finds no"), manyheads.use(models.tiny("llama"), "mla_hw"):
        pass
    store = stores(new_cache(model, parse(ABSORB)))[0]
    with pytest.raises(UserError, match="not latents"):
        store.update(torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 8))
    with pytest.raises(UserError, match="not latents"):
        store.update(torch.zeros(1, 1, 3, 12), torch.zeros(1, 1, 3, 8))
    assert store.keys is None and store.nbytes() == 0


def test_hybrid_layers_keep_their_own_cache():
    """Linear-attention layers between MLA layers are untouched."""
    from transformers.cache_utils import DynamicCache

    own = build("KimiLinear")
    kinds = [type(layer).__name__ for layer in DynamicCache(config=own.config).layers]
    ours = [type(layer).__name__ for layer in new_cache(own, parse(ABSORB)).layers]
    changed = [i for i, (a, b) in enumerate(zip(kinds, ours, strict=True)) if a != b]
    assert changed == LATENT["KimiLinear"][1]
