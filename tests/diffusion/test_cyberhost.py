# SPDX-License-Identifier: Apache-2.0
"""Region codebook attention: dense references, what it leaves alone, and the priors that it is trained with."""

import math

import pytest
import torch
from tests.tolerance import CLOSE, DEEP, FORMULA, MODEL, PROJECTED, assert_close, is_far, nearly, within
from torch import nn

import manyheads
from manyheads.calls.human_priors import (
    MASK_WEIGHT,
    ClarityEmbedding,
    PoseEncoder,
    clarity_score,
    heat_maps,
    local_loss,
    movement_map,
)  # fmt: skip
from manyheads.calls.stage_blocks import RegionSeen
from manyheads.conditioning import StageConfig
from manyheads.diffusion.cyberhost import Codebook, CyberHost, Region, gram_schmidt
from manyheads.errors import UserError
from manyheads.integrations.stage_blocks import adapted, stages_of

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

SPEC = "cyberhost:spatial=8,temporal=4"
DIM, HEADS, FRAMES = 12, 2, 3
STAGE = StageConfig(DIM, HEADS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(codes):
    """Gram-Schmidt as it is written: each row without its share of those before."""
    rows = []
    for code in codes:
        left = code - sum((torch.dot(code, row) * row for row in rows), torch.zeros_like(code))
        rows.append(left / left.norm())
    return torch.stack(rows)


def moved(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 0.3)
    return module


@pytest.mark.parametrize("n", [1, 4, DIM])
def test_gram_schmidt_is_its_loop(n):
    codes = drawn(n, DIM)
    got, limit = gram_schmidt(codes), within(torch.float64, 64 * n)
    assert_close(got, by_hand(codes), limit)
    assert_close(got @ got.T, torch.eye(n, dtype=torch.float64), limit)
    assert_close(gram_schmidt(got), got, limit)  # idempotent
    assert_close(gram_schmidt(codes * torch.arange(1, n + 1)[:, None]), got, limit)  # lengths are nothing
    assert_close(codes @ got.T @ got, codes, limit)  # the span is the same
    if n > 1:
        assert is_far(gram_schmidt(codes.flip(0)), got, limit)  # the order is not
        raw = [torch.linalg.qr(x.T)[0].T for x in (codes, -codes)]  # control: signs as LAPACK has them
        assert any(is_far(q, want, limit) for q, want in zip(raw, (got, gram_schmidt(-codes)), strict=True))
        assert is_far(codes @ codes.T, torch.eye(n, dtype=torch.float64), limit)  # control: as learned


def test_gram_schmidt_has_gradients():
    codes = drawn(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(gram_schmidt, codes)
    assert_close(*(torch.autograd.grad(f(codes)[:, :2].sum(), codes)[0] for f in (gram_schmidt, by_hand)), 1e-13)


def test_a_code_in_the_span_of_others_is_replaced():
    codes, spare = drawn(4, 6), drawn(4, 6, seed=1)
    codes[2] = 2 * codes[0] - codes[1]
    want = by_hand(torch.stack([codes[0], codes[1], spare[2], codes[3]]))
    codes.requires_grad_()
    got = gram_schmidt(codes, spare)
    assert_close(got, want, DEEP)
    got.square().mul(drawn(4, 6, seed=2)).sum().backward()
    assert codes.grad.isfinite().all() and torch.equal(codes.grad[2], torch.zeros(6, dtype=torch.float64))
    broken = torch.autograd.grad(gram_schmidt(codes)[3, 0], codes)[0]  # control: without spare rows
    assert not broken.isfinite().all() or float(broken.abs().max()) > 1e6
    assert torch.equal(gram_schmidt(drawn(3, 6), spare[:3]), gram_schmidt(drawn(3, 6)))


def test_codebooks_stay_orthogonal_where_learned_codes_collapse():
    """Two hundred steps towards one direction: without Gram-Schmidt all codes end there."""
    for orthogonal in (True, False):
        torch.manual_seed(0)
        book = Codebook(4, 8)
        optimizer = torch.optim.SGD(book.parameters(), lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            (book.codes(orthogonal) - torch.ones(8) / math.sqrt(8)).square().sum().backward()
            optimizer.step()
        codes = nn.functional.normalize(book.codes(orthogonal).detach(), dim=1)
        overlap = float((codes @ codes.T - torch.eye(4)).abs().max())
        assert overlap < 1e-5 if orthogonal else overlap > 0.99


def attention(layer, x, context):
    """Dense, from the formula."""
    q = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, k, v = (y @ w.weight.T + w.bias for y, w in ((q, layer.query), (context, layer.key), (context, layer.value)))
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
    weights = (torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(DIM // HEADS)).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).flatten(1) @ layer.out.weight.T + layer.out.bias


def reference(region, features, described, clock=True, orthogonal=True, mask=True, swapped=False):
    """One sample ``[T, H, W, D]``: frames over space, then every place over time."""
    books = [by_hand(b.learned) if orthogonal else b.learned for b in (region.space, region.time)]
    space, time = reversed(books) if swapped else books
    frames = torch.stack([attention(region.over_space, frame.flatten(0, 1), space) for frame in features])
    rate = 10_000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    phase = torch.arange(len(features), dtype=torch.float64)[:, None] * rate
    told = frames + clock * torch.cat([phase.sin(), phase.cos()], 1)[:, None]
    motion = torch.stack([attention(region.over_time, place, time) for place in told.unbind(1)], 1)
    own = torch.stack([attention(region.own, frame.flatten(0, 1), described) for frame in features])
    logits = torch.stack([region.mask(frame.permute(2, 0, 1)[None])[0, 0] for frame in features])
    added = (motion + own).unflatten(1, features.shape[1:3])
    return added * logits.sigmoid()[..., None] if mask else added


@torch.no_grad()
def test_a_region_against_the_formula():
    """Controls: no positions of frames, codes as learned, no mask, codebooks swapped."""
    region = moved(Region(CyberHost(spatial=8, temporal=4), STAGE, 10, 6).double())
    features, described = drawn(2, FRAMES, 4, 4, DIM, seed=2), drawn(2, 5, 10, seed=3)
    got, seen = region(features, described)
    limit = within(torch.float64, 16 * 32)
    want = torch.stack([reference(region, *pair) for pair in zip(features, described, strict=True)])
    assert_close(got, want, limit)
    assert seen.mask.shape == (2, FRAMES, 4, 4) and seen.heat.shape == (2, FRAMES, 6, 4, 4)
    for wrong in ({"clock": False}, {"orthogonal": False}, {"mask": False}, {"swapped": True}):
        assert is_far(got[0], reference(region, features[0], described[0], **wrong), limit)
    assert is_far(got[0], reference(region, features[0], described[1]), limit)


@torch.no_grad()
def test_gradients_of_a_region_are_those_of_the_formula():
    region = moved(Region(CyberHost(spatial=3, temporal=2), STAGE, 10, 0).double())
    features, described = drawn(1, 2, 2, 2, DIM, seed=2), drawn(1, 3, 10, seed=3)
    weight = drawn(1, 2, 2, 2, DIM, seed=4)
    with torch.enable_grad():
        named = dict(region.named_parameters())
        got = torch.autograd.grad((region(features, described)[0] * weight).sum(), named.values())
        want = torch.autograd.grad((reference(region, features[0], described[0]) * weight[0]).sum(), named.values())
    for name, one, other in zip(named, got, want, strict=True):
        if not name.endswith("key.bias"):  # adds the same to all logits: its gradient is rounding alone
            assert_close(one, other, within(torch.float64, 40 * 32))


@torch.no_grad()
def test_reshapes_are_nothing_without_a_clock_and_frames_count_with_one():
    """Keys are the same for all queries: frames in another order give the same, in that order; control: a clock."""
    for clock in (False, True):
        region = moved(Region(CyberHost(spatial=8, temporal=4, clock=clock), STAGE, 10, 0).double())
        tokens = drawn(1, FRAMES, 4, DIM, seed=2)
        turned = region.motion(tokens.flip(1)).flip(1)
        assert (is_far if clock else assert_close)(turned, region.motion(tokens), PROJECTED) or not clock


@torch.no_grad()
def test_the_order_of_orthonormal_codes_is_nothing():
    """Only Gram-Schmidt makes the order count: control, the same rows before it."""
    region = moved(Region(CyberHost(spatial=8, temporal=4), STAGE, 10, 0).double())
    tokens = drawn(1, FRAMES, 4, DIM, seed=2)
    want = region.motion(tokens)
    learned = region.space.learned.clone()
    region.space.learned.copy_(gram_schmidt(learned)[torch.randperm(8)])
    assert_close(region.motion(tokens), want, DEEP)
    region.space.learned.copy_(learned.flip(0))
    assert is_far(region.motion(tokens), want, DEEP)


@torch.no_grad()
def test_features_outside_a_binary_mask_are_untouched():
    region = moved(Region(CyberHost(spatial=8, temporal=4), STAGE, 10, 0).double())
    features, described = drawn(1, 1, 4, 4, DIM, seed=2), drawn(1, 5, 10, seed=3)
    inside = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    inside[..., :2, 1:] = 1

    class Binary(nn.Module):
        def forward(self, images):
            return torch.where(inside > 0, torch.inf, -torch.inf)

    region.mask = Binary()
    added, _ = region(features, described)
    assert torch.equal(added[inside[0, 0][None, None] == 0], torch.zeros(10, DIM, dtype=torch.float64))
    assert (added[inside[0, 0][None, None] > 0].abs().amax(-1) > 0).all()
    free = Region(CyberHost(spatial=8, temporal=4, mask=False), STAGE, 10, 0).double()
    assert free.mask is None and (moved(free)(features, described)[0].abs().amax(-1) > 0).all()


def wan():
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, in_channels=2, out_channels=2,
        text_dim=8, freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=8,
    ).double().eval()  # fmt: skip


def unet():
    torch.manual_seed(0)
    return diffusers.UNetMotionModel(
        sample_size=4, in_channels=2, out_channels=2, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
        motion_max_seq_length=4,
    ).double().eval()  # fmt: skip


DENOISERS = {"wan": (wan, 2, 1), "unet": (unet, 5, FRAMES)}  # blocks, and texts a video


def inputs(texts=1):
    crops = [drawn(2, 1, 3, 8, 8, seed=5), drawn(2, 2, 3, 8, 8, seed=6)]
    return (
        drawn(2, 2, FRAMES, 4, 4, seed=7),
        torch.tensor([300.0, 800.0]).double(),
        crops,
        drawn(2 * texts, 3, 8, seed=8),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", DENOISERS)
def test_blocks_begin_as_nothing_and_act_once_they_are_trained(name):
    make, blocks, texts = DENOISERS[name]
    denoiser = make()
    sample, time, crops, text = inputs(texts)
    key = "hidden_states" if name == "wan" else "sample"
    given = {key: sample, "timestep": time, "encoder_hidden_states": text, "return_dict": False}
    plain, kinds = denoiser(**given)[0], [type(m) for m in denoiser.modules()]
    model = adapted(denoiser, SPEC)
    out, seen = model(sample, time, crops, encoder_hidden_states=text)
    assert torch.equal(out, plain) and len(seen) == blocks == len(stages_of(denoiser))
    assert set(seen[0]) == {"face", "hand"} and seen[0]["face"].heat is None
    moved(model.inserted)
    told = model(sample, time, crops, encoder_hidden_states=text).sample
    assert is_far(told, plain, DEEP)
    other = [crops[0], crops[1] + 1]
    assert is_far(model(sample, time, other, encoder_hidden_states=text).sample, told, DEEP)
    one = model(sample[:1], time[:1], [c[:1] for c in crops], encoder_hidden_states=text[:texts]).sample
    assert_close(one, told[:1], within(torch.float64, 4 * MODEL))  # samples of a batch do not meet; five blocks deep
    assert torch.equal(denoiser(**given)[0], plain) and [type(m) for m in denoiser.modules()] == kinds
    with pytest.raises(RuntimeError):
        model(sample, time, crops, encoder_hidden_states=text[..., :3])
    assert torch.equal(denoiser(**given)[0], plain) and [type(m) for m in denoiser.modules()] == kinds


@torch.no_grad()
def test_features_of_every_block_by_hand():
    """The second block's tokens, through the stage and on: control, the frames of another layout."""
    denoiser = wan()
    sample, time, crops, text = inputs()
    model = adapted(denoiser, CyberHost(spatial=8, temporal=4, layers=(1,)))
    moved(model.inserted)
    kept = {}
    handle = denoiser.blocks[1].register_forward_hook(lambda _, __, out: kept.update(block=out))
    ahead = denoiser.norm_out.register_forward_pre_hook(lambda _, given: kept.update(read=given[0]))
    model(sample, time, crops, encoder_hidden_states=text)
    handle.remove(), ahead.remove()
    described = model.inserted.described(crops)
    features = kept["block"].reshape(2, FRAMES, 2, 2, DIM)
    want = model.inserted.stage(0, features, described).features
    assert_close(kept["read"], want.flatten(1, 3).float(), CLOSE)
    turned = model.inserted.stage(0, features.transpose(2, 3), described).features.transpose(2, 3)
    assert is_far(kept["read"], turned.flatten(1, 3).float(), CLOSE)


@torch.no_grad()
def test_leading_frames_are_left_alone():
    model = adapted(wan(), CyberHost(spatial=8, temporal=4, layers=(1,)))
    sample, time, crops, text = inputs()
    plain = model(sample, time, crops, encoder_hidden_states=text).sample
    moved(model.inserted)
    out, seen = model(sample, time, crops, lead=1, encoder_hidden_states=text)
    assert torch.equal(out[:, :, :1], plain[:, :, :1]) and is_far(out[:, :, 1:], plain[:, :, 1:], DEEP)
    assert seen[0]["hand"].mask.shape == (2, FRAMES - 1, 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", DENOISERS)
def test_what_is_added_to_time(name):
    """As if the embedding's last bias were larger by it; control: another."""
    make, _, texts = DENOISERS[name]
    denoiser = make()
    sample, time, crops, text = inputs(texts)
    embed = denoiser.condition_embedder.time_embedder if name == "wan" else denoiser.time_embedding
    added = drawn(embed.linear_2.out_features, seed=9)
    model = adapted(denoiser, None)
    got, seen = model(sample, time, crops, time_added=added.expand(2, -1), encoder_hidden_states=text)
    none = model(sample, time, crops, encoder_hidden_states=text).sample
    embed.linear_2.bias.add_(added)
    assert_close(got, model(sample, time, crops, encoder_hidden_states=text).sample, DEEP)
    assert is_far(got, none, DEEP) and seen == []


def test_what_is_refused():
    denoiser = wan()
    with pytest.raises(UserError, match="at most 12 codes"):
        adapted(denoiser, "cyberhost:spatial=13,temporal=4")
    assert adapted(denoiser, "cyberhost:spatial=13,temporal=4,orthogonal=false").inserted is not None
    with pytest.raises(UserError, match="there is no 2"):
        adapted(denoiser, SPEC + ",layers=1-2")
    with pytest.raises(UserError, match="sag inserts no blocks"):
        adapted(denoiser, "sag")
    with pytest.raises(UserError, match="Linear is not known"):
        adapted(nn.Linear(2, 2), None)
    with pytest.raises(UserError, match="nothing would be added"):
        CyberHost(codebook=False, identity=False)
    with pytest.raises(UserError, match="a code at least"):
        CyberHost(temporal=0)
    with pytest.raises(UserError, match="trained with a denoiser"):
        manyheads.use(denoiser, "cyberhost").__enter__()
    sample, time, crops, text = inputs()
    with pytest.raises(UserError, match="crops of face and hand"):
        adapted(denoiser, SPEC)(sample, time, crops[:1], encoder_hidden_states=text)
    blind = adapted(denoiser, SPEC + ",identity=false")
    assert blind(sample, time, [], encoder_hidden_states=text).sample.shape == sample.shape


def test_half_precision_stays_orthogonal():
    """Codes are made orthogonal in float32 whatever a model is held in; control: in bfloat16 they are not."""
    book = Codebook(8, 16).bfloat16()
    codes = book.codes()
    assert codes.dtype == torch.float32
    assert_close(codes @ codes.T, torch.eye(8), within(torch.float32, 512))
    rounded = codes.bfloat16().float()
    assert is_far(rounded @ rounded.T, torch.eye(8), within(torch.float32, 512))


def test_the_map_of_movement_by_hand():
    chest = torch.tensor([[[[4.0, 6], [6, 10]], [[6.0, 6], [8, 10]]]])  # x from 4 to 8, y from 6 to 10
    plain, wide = (movement_map(chest, torch.tensor([f]), 16)[0, 0] for f in (1.0, 1.5))
    want = torch.zeros(16, 16)
    want[6:10, 4:8] = 1
    assert torch.equal(plain, want)
    want[5:11, 3:9] = 1
    assert torch.equal(wide, want)


def test_clarity_by_hand_and_of_blur():
    crop = torch.zeros(1, 3, 4, 4)
    crop[0, :, 1, 1] = 1  # grey of 1: the Laplacian of the inner 2 x 2 is -4, 1, 1, 0
    assert float(clarity_score(crop, 4)) == nearly(
        float(torch.tensor([-4.0, 1, 1, 0]).std(unbiased=False)), torch.float32
    )
    sharp = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(sharp.flatten(0, 1), 3, 1, 1).unflatten(0, (2, 5))
    assert clarity_score(sharp).shape == (2, 5) and (clarity_score(blurred) < clarity_score(sharp)).all()


def test_heat_maps_by_hand():
    points = torch.tensor([[5.0, 3.0]], dtype=torch.float64)
    found = heat_maps(points, 16, 8, 2.0)
    assert found.shape == (1, 8, 8) and divmod(int(found.argmax()), 8) == (1, 2)
    assert float(found[0, 1, 2]) == nearly(1.0)  # the cell whose middle is at (5, 3)
    assert float(found[0, 4, 2]) == nearly(math.exp(-(6.0**2) / 8))


def test_what_is_added_is_nothing_at_first():
    for module, given in ((PoseEncoder(3), torch.rand(2, 1, 4, 4)), (ClarityEmbedding(5), torch.rand(2))):
        assert not module(given).any()
        with torch.no_grad():
            module.second.weight.add_(1)
        assert module(given).any() and is_far(module(given), module(given * 2))


def test_the_loss_by_hand():
    """Regions count twice, heat maps of some samples, masks by cross-entropy; control: without local supervision."""
    error, within_region = drawn(2, 3, 2, 4, 4).square(), (drawn(2, 2, 4, 4, seed=1) > 0).double()
    logits, heat = drawn(2, 2, 2, 2, seed=2).float(), drawn(2, 2, 6, 2, 2, seed=3).float()
    box, right = (drawn(2, 2, 2, 2, seed=4) > 0).float(), drawn(2, 2, 6, 2, 2, seed=5).float()
    counted = torch.tensor([1.0, 0.0])
    seen = [{"hand": RegionSeen(logits, heat), "face": RegionSeen(None, None)}] * 2
    got = local_loss(error, within_region, seen, {"hand": box}, {"hand": right}, counted)
    p = logits.double().sigmoid()
    masks = -(box * p.log() + (1 - box) * (1 - p).log()).mean()
    maps = (heat.double()[0] - right[0]).square().mean() / 2  # the mean over two samples, of which one counts
    weighted = (error * (1 + within_region[:, None])).mean()
    assert float(got) == nearly(float(weighted + 2 * (MASK_WEIGHT * masks + maps)), torch.float32)
    plain = local_loss(error, within_region, seen, {"hand": box}, {"hand": right}, counted, local=False)
    assert float(plain) == nearly(float(error.mean() + 2 * MASK_WEIGHT * masks), torch.float32)
    assert float(local_loss(error, 0 * within_region, [], {}, {}, counted)) == nearly(float(error.mean()))
    assert FORMULA < CLOSE
