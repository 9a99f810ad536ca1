# SPDX-License-Identifier: Apache-2.0
"""MLA: every schedule is the same attention, and costs what the model says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from manyheads.attention import mla, reference
from manyheads.attention.mla import Dims, Platform
from manyheads.errors import UserError
from oracles import models
from tolerance import FORMULA, HALF_FACTOR, assert_close, error, nearly

SCHEDULES = ("expand", "absorb", "reuse", "recompute")
V3 = Dims(num_heads=128, rank=512, nope_dim=128, rope_dim=64, v_dim=128)
SMALL = Dims(num_heads=3, rank=7, nope_dim=4, rope_dim=2, v_dim=5, q_rank=6)
H100 = mla.platform_of("NVIDIA H100 80GB HBM3")
sizes = some.integers(1, 9)
dims_drawn = some.builds(Dims, *[some.integers(1, 5)] + [some.integers(1, 9)] * 5)


def case(dims=SMALL, batch=2, new=3, seen=8, dtype=torch.float64, seed=0):
    """Random query latents, rotated query parts, cache and weights."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    h = dims.num_heads
    return {
        "c_q": draw(batch, new, dims.q_rank),
        "q_rope": draw(batch, h, new, dims.rope_dim),
        "cache": draw(batch, 1, seen, dims.rank + dims.rope_dim),
        "uq": draw(h, dims.nope_dim, dims.q_rank),
        "up": draw(h, dims.nope_dim + dims.v_dim, dims.rank),
        "dims": dims,
    }


def query(c_q, q_rope, uq):
    """``[B, H, T, dn + dr]``"""
    return torch.cat([torch.einsum("btr,hnr->bhtn", c_q, uq), q_rope], -1)


def formula(c_q, q_rope, cache, uq, up, dims, scale, mask):
    """Head by head, from keys and values written out."""
    out = []
    latents, rope = cache[:, 0, :, : dims.rank], cache[:, 0, :, dims.rank :]
    for h in range(dims.num_heads):
        k = torch.cat([latents @ up[h, : dims.nope_dim].T, rope], -1)
        q = torch.cat([c_q @ uq[h].T, q_rope[:, h]], -1)
        x = q @ k.transpose(1, 2) * scale
        out.append(reference.softmax(x, mask) @ (latents @ up[h, dims.nope_dim :].T))
    return torch.stack(out, 2)


def masks(batch, new, seen):
    causal = reference.causal_mask(new, seen)
    padded = causal.expand(batch, 1, -1, -1).clone()
    padded[-1, :, :, : seen // 2] = False
    empty = padded.clone()
    empty[0, :, 0] = False
    return [None, causal[None, None], padded, empty, padded[:, :, -1:]]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("batch", "new", "seen"), [(1, 1, 1), (2, 1, 9), (2, 3, 8), (3, 5, 5), (1, 4, 65)])
def test_against_the_formula(schedule, batch, new, seen):
    for mask in masks(batch, new, seen):
        given_ = case(batch=batch, new=new, seen=seen)
        got = mla.mla(schedule, **given_, scale=0.3, mask=mask)
        flat = None if mask is None else mask[:, 0]
        assert_close(got, formula(**given_, scale=0.3, mask=flat), FORMULA)


@given(dims=dims_drawn, batch=some.integers(1, 3), new=sizes, more=sizes)
def test_schedules_agree(dims, batch, new, more):
    given_ = case(dims, batch, new, new + more)
    mask = masks(batch, new, new + more)[2]
    made = [mla.mla(schedule, **given_, scale=0.2, mask=mask) for schedule in SCHEDULES]
    merged = mla.merge(given_["uq"], given_["up"], dims)
    made.append(mla.mla("reuse", **given_, scale=0.2, mask=mask, merged=merged))
    for other in made[1:]:
        assert_close(other, made[0], FORMULA)


def test_control_of_the_schedules():
    """Values read with the key's weights, an unrotated part left out, a wrong scale: each is seen."""
    given_ = case(Dims(3, 7, 5, 2, 5, 6))
    want = mla.mla("absorb", **given_, scale=0.3)
    swapped = {**given_, "up": given_["up"].flip(1)}
    rotated = {**given_, "q_rope": torch.zeros_like(given_["q_rope"])}
    for wrong in (mla.mla("absorb", **swapped, scale=0.3), mla.mla("absorb", **rotated, scale=0.3)):
        assert error(wrong, want) > 1e-2
    assert error(mla.mla("absorb", **given_, scale=0.2), want) > 1e-2
    stale = mla.merge(given_["uq"].flip(0), given_["up"], given_["dims"])
    assert error(mla.mla("reuse", **given_, scale=0.3, merged=stale), want) > 1e-2


def test_queries_in_blocks_and_a_bias(monkeypatch):
    given_ = case(new=7, seen=9)
    q = query(given_["c_q"], given_["q_rope"], given_["uq"])
    mask, bias = masks(2, 7, 9)[3], torch.randn(2, 1, 7, 9, dtype=torch.float64)
    k, v = mla.keys_values(given_["cache"], given_["up"], SMALL)
    want = reference.attention(q, k, v, scale=0.3, mask=mask, bias=bias)
    for block in (1, 2 * 3 * 9 * 3, 1 << 26):
        monkeypatch.setattr(mla, "_BLOCK", block)
        got = mla.absorb(q, given_["cache"], given_["up"], SMALL, scale=0.3, mask=mask, bias=bias)
        assert_close(got, want, FORMULA)
        row = mla.absorb(q, given_["cache"], given_["up"], SMALL, scale=0.3, mask=mask[:, :, 3:4], bias=bias[:, :, :1])
        want_row = reference.attention(q, k, v, scale=0.3, mask=mask[:, :, 3:4], bias=bias[:, :, :1])
        assert_close(row, want_row, FORMULA)
    assert not bool(got[0, 0].any())  # the row that may attend to nothing


def test_identity_blocks_are_ordinary_attention():
    """r = H d and the identity in blocks: MHA over keys and values that lie side by side in the latent."""
    heads, d = 3, 4
    dims = Dims(heads, heads * d, d, 0, d)
    own = torch.eye(heads * d, dtype=torch.float64).view(heads, d, heads * d)
    up = torch.cat([own, own], 1)
    q, held = torch.randn(2, heads, 5, d).double(), torch.randn(2, 1, 9, heads * d).double()
    k = held[:, 0].unflatten(-1, (heads, d)).transpose(1, 2)
    mask = reference.causal_mask(5, 9)[None, None]
    for way in (mla.absorb, mla.expand):
        got = way(q, held, up, dims, scale=0.5, mask=mask)
        assert_close(got, reference.attention(q, k, k, scale=0.5, mask=mask), FORMULA)
    shared = torch.eye(d, dtype=torch.float64).repeat(heads, 2, 1)  # r = d, one identity for all heads: MQA
    held = held[..., :d]
    got = mla.absorb(q, held, shared, Dims(heads, d, d, 0, d), scale=0.5, mask=mask)
    assert_close(got, reference.attention(q, held, held, scale=0.5, mask=mask), FORMULA)
    assert error(got, reference.attention(q, k, k, scale=0.5, mask=mask)) > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_the_module_of_transformers(schedule):
    """The attention module of DeepSeek-V3 in float64, from its own weights."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = models.config("deepseek_v3", attn_implementation="sdpa")  # eager rounds its weights to float32
    module = theirs.DeepseekV3Attention(config, 0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, 6, config.hidden_size).double()
    cos, sin = theirs.DeepseekV3RotaryEmbedding(config)(hidden, torch.arange(6)[None])
    causal = reference.causal_mask(6, 6)[None, None]
    with torch.no_grad():
        want = module(hidden, (cos, sin), causal)[0]
        dims = Dims(module.num_heads, module.kv_lora_rank, module.qk_nope_head_dim, module.qk_rope_head_dim,
                    module.v_head_dim, module.q_lora_rank)  # fmt: skip
        c_q = module.q_a_layernorm(module.q_a_proj(hidden))
        per_head = module.q_b_proj.weight.unflatten(0, (dims.num_heads, -1))
        uq, ur = per_head.split([dims.nope_dim, dims.rope_dim], 1)
        latent, k_rope = module.kv_a_proj_with_mqa(hidden).split([dims.rank, dims.rope_dim], -1)
        q_rope = torch.einsum("btr,hnr->bhtn", c_q, ur)
        q_rope, k_rope = theirs.apply_rotary_pos_emb_interleave(q_rope, k_rope[:, None], cos, sin)
        cache = torch.cat([module.kv_a_layernorm(latent)[:, None], k_rope], -1)
        up = module.kv_b_proj.weight.unflatten(0, (dims.num_heads, -1))
        out = mla.mla(schedule, c_q, q_rope, cache, uq, up, dims, scale=module.scaling, mask=causal)
        assert_close(module.o_proj(out.flatten(2)), want, FORMULA)
        wrong = mla.mla(schedule, c_q, q_rope, cache.roll(1, -2), uq, up, dims, scale=module.scaling, mask=causal)
        assert error(module.o_proj(wrong.flatten(2)), want) > 1e-2


def test_gradients():
    given_ = case(Dims(2, 4, 3, 2, 3, 3), 1, 2, 4)
    inputs = [given_[name].requires_grad_() for name in ("c_q", "q_rope", "cache", "uq", "up")]
    mask = masks(1, 2, 4)[3]
    for schedule in SCHEDULES:
        torch.autograd.gradcheck(
            lambda *x, schedule=schedule: mla.mla(schedule, *x, given_["dims"], scale=0.3, mask=mask), inputs
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Absorbed attention is as near to float64 as plain torch, which expands, in the same dtype."""
    dims = Dims(8, 64, 32, 16, 32, 48)
    truth, rounded = case(dims, 2, 2, 200), case(dims, 2, 2, 200, dtype)
    scale = 48**-0.5 / 8

    def run(way, x):
        q = query(x["c_q"], x["q_rope"], x["uq"]) / 8
        return way(q, x["cache"], x["up"] / 8, dims, scale=scale)

    want = run(mla.expand, truth)
    ours, plain = (error(run(way, rounded).double(), want) for way in (mla.absorb, mla.expand))
    assert ours <= HALF_FACTOR * plain, f"{ours:.2g} against {plain:.2g}"


class Traffic(TorchDispatchMode):
    """Bytes that matrix products read and write: each element of each tensor once."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "baddbmm"):
            tensors = [*args[1 if name == "baddbmm" else 0 :][:2], out]
            self.products.append(sum(_own(t) * t.element_size() for t in tensors))
        return out


def _own(x):
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(dims=dims_drawn, batch=some.integers(1, 3), new=sizes, more=sizes)
def test_the_cost_is_what_runs(schedule, dims, batch, new, more):
    """FLOPs as torch counts them, exactly, and the bytes of every matrix product from the sizes of its tensors."""
    given_ = case(dims, batch, new, new + more, torch.float32)
    merged = mla.merge(given_["uq"], given_["up"], dims) if schedule == "reuse" else None
    stages = mla.mla_cost(schedule, dims, batch, new, new + more, itemsize=4, fused_heads=False)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # torch counts no fused CPU kernel
        mla.mla(schedule, **given_, scale=0.3, merged=merged)
    assert counted.get_total_flops() == sum(stage.flops for stage in stages)
    fused = mla.mla_cost(schedule, dims, batch, new, new + more, itemsize=4, fused=True)
    assert sum(stage.flops for stage in fused) == counted.get_total_flops()
    with Traffic() as seen, sdpa_kernel(SDPBackend.MATH):
        mla.mla(schedule, **given_, scale=0.3, merged=merged)
    assert seen.products == [stage.bytes for stage in stages if stage.flops]
    wrong = mla.mla_cost(schedule, dims, batch, new, new + more + 1, itemsize=4)
    assert counted.get_total_flops() != sum(stage.flops for stage in wrong)


def test_bytes_between_products():
    """What is no product: the softmax over the logits, and the keys put together, as the tensors have it."""
    given_ = case(SMALL, 2, 3, 8, torch.float32)
    x = 2 * 3 * 3 * 8
    softmax = {s.name: s.bytes for s in mla.mla_cost("absorb", SMALL, 2, 3, 8, 4)}["softmax"]
    assert softmax == 2 * 4 * x and {s.name: s.bytes for s in mla.mla_cost("absorb", SMALL, 2, 3, 8, 2)}[
        "softmax"
    ] == x * (4 + 4 + 4 + 2)
    k, v = mla.keys_values(given_["cache"], given_["up"], SMALL)
    nope, rope = k[..., : SMALL.nope_dim], given_["cache"][..., SMALL.rank :]
    stages = {s.name: s.bytes for s in mla.mla_cost("expand", SMALL, 2, 3, 8, 4)}
    assert stages["join keys"] == 4 * (nope.numel() + rope.numel() + k.numel())
    q = query(given_["c_q"], given_["q_rope"], given_["uq"])
    assert stages["attention"] == 4 * (q.numel() + k.numel() + v.numel() + 2 * 3 * 3 * SMALL.v_dim)
    fused = {s.name: s.bytes for s in mla.mla_cost("absorb", SMALL, 2, 3, 8, 4, fused=True)}
    rows = 2 * 3 * 3
    assert fused["attention"] == 4 * (rows * (7 + 2) + given_["cache"].numel() + rows * 7)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_cost_of_ordinary_heads(kv_heads):
    q, k, v = (torch.randn(2, h, n, d) for h, n, d in ((8, 3, 24), (kv_heads, 9, 24), (kv_heads, 9, 16)))
    (stage,) = mla.heads_cost(2, 3, 9, 8, kv_heads, 24, 16, itemsize=4)
    parts = mla.heads_cost(2, 3, 9, 8, kv_heads, 24, 16, itemsize=4, fused=False)
    with FlopCounterMode(display=False) as counted:
        out = reference.attention(q, k, v, scale=1.0)
    assert stage.flops == sum(part.flops for part in parts) == counted.get_total_flops()
    assert sum(part.bytes for part in parts) == stage.bytes + 4 * 4 * 2 * 8 * 3 * 9  # logits out, in, out, in
    assert stage.bytes == 4 * (q.numel() + k.numel() + v.numel() + out.numel())


def test_figures_of_deepseek_v3():
    def flops(schedule, seen):
        return sum(s.flops for s in mla.mla_cost(schedule, V3, 1, 1, seen))

    assert flops("absorb", 4096) / 1e9 == pytest.approx(1.17, abs=0.01)
    assert flops("expand", 4096) / 1e9 == pytest.approx(137.8, abs=0.05)
    assert mla.crossover(V3) == nearly(131072 / 768)
    far = mla.mla_cost("absorb", V3, 1, 1, 10**9, fused=True)
    attention = next(s for s in far if s.name == "attention")
    assert attention.intensity == pytest.approx(128 * (2 * 512 + 64) / (512 + 64), rel=1e-6)  # 241.8 FLOP per byte
    (mha,) = mla.heads_cost(1, 1, 10**6, 128, 128, 128, 128)
    (gqa,) = mla.heads_cost(1, 1, 10**6, 128, 16, 128, 128)
    assert mha.intensity == pytest.approx(1, rel=2e-5) and gqa.intensity == pytest.approx(8, rel=2e-5)


@given(dims=dims_drawn, seen=some.integers(1, 400))
def test_crossover_is_where_flops_cross(dims, seen):
    def flops(schedule, new):
        return sum(s.flops for s in mla.mla_cost(schedule, dims, 2, new, seen))

    here = mla.crossover(dims, seen)
    for new in range(1, 60):
        expand, absorb = flops("expand", new), flops("absorb", new)
        if new == pytest.approx(here, rel=1e-9):
            assert expand == absorb
        else:
            assert (expand < absorb) == (new > here)


def test_crossover_is_the_argmin():
    """By brute force, and one that leaves out the rotary part of the gap would be found wrong."""
    costs = {
        way: [sum(s.flops for s in mla.mla_cost(way, V3, 1, n, 10**7)) for n in range(1, 400)]
        for way in ("expand", "absorb")
    }
    first = 1 + next(i for i, (e, a) in enumerate(zip(costs["expand"], costs["absorb"], strict=True)) if e < a)
    assert first == math.ceil(mla.crossover(V3)) == 171 != math.ceil(131072 / (2 * 512 + 64 - 256))
    assert mla.crossover(Dims(4, 8, 8, 4, 8)) == math.inf  # latents no larger than a head: absorbing never costs more


@given(
    schedule=some.sampled_from(SCHEDULES), dims=dims_drawn, batch=some.integers(1, 8), new=sizes, more=sizes,
    peak=some.floats(1e9, 1e15), band=some.floats(1e9, 1e13), factor=some.floats(1, 100),
)  # fmt: skip
def test_better_hardware_is_never_slower(schedule, dims, batch, new, more, peak, band, factor):
    stages = mla.mla_cost(schedule, dims, batch, new, new + more)
    here = mla.seconds(stages, Platform(peak, band))
    assert mla.seconds(stages, Platform(factor * peak, band)) <= here
    assert mla.seconds(stages, Platform(peak, factor * band)) <= here
    assert mla.seconds(stages, Platform(peak, band, overhead=1e-6)) > here
    bound = max(sum(s.flops for s in stages) / peak, sum(s.bytes for s in stages) / band)
    assert here >= bound * (1 - 1e-12)
    longer = mla.mla_cost(schedule, dims, batch, new, new + more + 1)
    assert mla.seconds(longer, Platform(peak, band)) >= here


def test_choice_follows_the_platform():
    assert mla.choose(V3, 8, 1, 16384, H100) == "absorb"
    assert mla.choose(V3, 1, 8192, 16384, H100) == "expand"
    for new in (1, 16, 64, 128, 256, 1024):
        for batch in (1, 8):
            best = min(("absorb", "expand"), key=lambda way: mla.seconds(mla.mla_cost(way, V3, batch, new, 4096), H100))
            assert mla.choose(V3, batch, new, 4096, H100) == best
    merged = Dims(128, 512, 128, 64, 128, 1536)
    ways = ("reuse", "recompute")
    narrow, slow = Platform(1e15, 1e11), Platform(1e12, 1e13)  # bytes are dear, FLOPs are dear
    assert mla.choose(merged, 1, 1, 1024, narrow, fused=True, among=ways) == "recompute"
    assert mla.choose(merged, 1, 1, 1024, slow, fused=True, among=ways) == "reuse"
    for platform in (narrow, slow, H100):  # both are worse than two small products one after the other
        assert mla.choose(merged, 1, 1, 1024, platform, fused=True, among=("absorb", *ways)) == "absorb"
    flat = Dims(4, 8, 64, 4, 64, 8)  # where heads are wider than latents the merged product is the smaller one
    assert mla.choose(flat, 1, 1, 64, slow, among=("absorb", *ways)) == "reuse"
    with pytest.raises(ValueError, match="q_rank"):
        mla.mla_cost("reuse", V3, 1, 1, 8)


def test_energy():
    stages = mla.mla_cost("absorb", V3, 1, 1, 4096)
    flops, moved = sum(s.flops for s in stages), sum(s.bytes for s in stages)
    platform = Platform(1e12, 1e12, flop_energy=2e-12, byte_energy=1e-11)
    assert mla.energy(stages, platform) == nearly(2e-12 * flops + 1e-11 * moved)
    for name in mla.PLATFORMS:  # nothing is known of them, which is not nothing
        with pytest.raises(UserError, match="flop_energy"):
            mla.energy(stages, mla.platform_of(f"NVIDIA {name}" if name != "cpu" else name))
    with pytest.raises(UserError, match="flop_energy"):
        mla.energy(stages, Platform(1e12, 1e12, flop_energy=2e-12))


def test_platforms():
    for key in ("H200", "H100", "A100"):
        half, full, bandwidth = mla.PLATFORMS[key]
        assert mla.platform_of(f"NVIDIA {key} SXM", 2).peak_flops == half
        assert mla.platform_of(f"NVIDIA {key} SXM", 4).peak_flops == full
        assert mla.platform_of(f"NVIDIA {key} SXM", 4).bandwidth == bandwidth
    assert mla.platform_of("NVIDIA A100-SXM4-80GB") == mla.platform_of("NVIDIA A100")
    for name, key in {
        "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA L4": "L4", "NVIDIA L40S": "L40S", "NVIDIA A10": "A10",
        "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA A100-PCIE-40GB": "A100 40GB",
    }.items():  # fmt: skip
        assert mla.platform_of(name).bandwidth == mla.PLATFORMS[key][2] != mla.PLATFORMS["A100"][2]
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "mps"):
        with pytest.raises(UserError, match="bandwidth_gbs"):
            mla.platform_of(name)
    assert mla.platform_of("cpu").bandwidth == mla.PLATFORMS["cpu"][2] and not mla.platform_of("cpu").fused_heads
