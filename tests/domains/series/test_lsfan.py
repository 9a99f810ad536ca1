# SPDX-License-Identifier: Apache-2.0
"""L-SFAN against its formulas in float64, written out over frames, channels and heads."""

import math

import numpy as np
import pytest
import torch

from manyheads.domains.series.lsfan import LSFAN, Lsfan, SensorAttention
from manyheads.errors import UserError
from manyheads.spec import parse
from tolerance import DEEP, PROJECTED, is_close, is_far

B, T, F, D, H, K = 2, 12, 5, 8, 2, 3


class Task:
    """As much of a task as the model asks for."""

    dim, layers, heads, dropout = D, 2, H, 0.0
    channels, classes = tuple("abcde"), tuple("xyz")


def made(spec="lsfan", **fields):
    """Every parameter and statistic drawn, so that none hides by starting at 0 or 1."""
    model = parse(spec).build(Task(), 9)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else 0.4 * torch.randn_like(x))
    return model.double().eval()


@pytest.fixture
def x():
    return torch.randn(B, T, F, dtype=torch.float64)


def conv_reference(conv, norm, x):
    """A block of the trunk of ``x [channels in, T, F]``: taps one by one, BN, ReLU, the larger of two frames."""
    _, frames, sensors = x.shape
    out = torch.zeros(len(conv.weight), frames, sensors, dtype=x.dtype)
    tall, wide = conv.kernel_size
    for t in range(frames):
        for f in range(sensors):
            for i in range(tall):
                for j in range(wide):
                    s, g = t + i - tall // 2, f + j - wide // 2
                    if 0 <= s < frames and 0 <= g < sensors:
                        out[:, t, f] += conv.weight[:, :, i, j] @ x[:, s, g]
    out = out + conv.bias[:, None, None]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    out = (scale[:, None, None] * (out - norm.running_mean[:, None, None]) + norm.bias[:, None, None]).clamp(min=0)
    return torch.stack([out[:, t : t + 2].amax(1) for t in range(0, frames, 2)], 1)


def attention_reference(a, x):
    """softmax(q k / sqrt(d)) v for each head and query of ``x [N, D]``."""
    q, k, v = a.qkv(x).chunk(3, -1)
    out, d = torch.zeros_like(x), D // H
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(x)):
            weights = torch.stack([q[i, part] @ k[j, part] / math.sqrt(d) for j in range(len(x))]).softmax(0)
            out[i, part] = sum(w * v[j, part] for j, w in enumerate(weights))
    return a.out(out)


def reference(model, x, pool="time"):
    """Logits of one window ``[T, F]``."""
    scale = (model.scale.running_var + model.scale.eps).sqrt()
    maps = ((x - model.scale.running_mean) / scale)[None]
    for block in model.trunk:
        maps = conv_reference(block[0], block[1], maps)
    tokens = maps.mean(1).T if pool == "time" else maps.mean(2).T
    tokens = tokens + model.where
    if model.attention is not None:
        tokens = model.norms[0](tokens + attention_reference(model.attention, tokens))
    tokens = model.norms[1](tokens + model.mlp(tokens))
    return model.head(tokens.mean(0))


@pytest.mark.parametrize("spec", ["lsfan", "lsfan:pool=sensors", "lsfan:attend=false", "lsfan:kernel=3,reach=1"])
def test_the_model_is_its_formula_forward_and_backward(x, spec):
    model, grads = made(spec), []
    pool = parse(spec).pool
    weights = torch.randn(B, K, dtype=torch.float64)
    for of in (lambda: model(x), lambda: torch.stack([reference(model, one, pool) for one in x])):
        model.zero_grad()
        out = of()
        (out * weights).sum().backward()
        grads.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*grads, strict=True):
        assert is_close(got, want, DEEP)
    if pool == "time":  # control: the mean over the other axis is another model
        model.where.data = model.where.data[:1]
        model.pool = "sensors"
        assert is_far(model(x), grads[1][0], DEEP)


def test_one_token_is_the_mean_of_all(x):
    model = made("lsfan:pool=both")
    maps = model.features(x)
    assert is_close(model.tokens(maps), model.where + maps.mean((2, 3))[:, None], PROJECTED)
    assert is_close(
        model.attention(model.tokens(maps)),
        model.attention.out(model.attention.qkv(model.tokens(maps))[..., 2 * D :]),
        PROJECTED,
    )


def test_attention_relates_channels_and_not_frames(x):
    """What is pooled forgets the order of frames of the trunk, and knows which channel is which."""
    model = made()
    maps = model.features(x)
    assert model.tokens(maps).shape == (B, F, D)
    assert is_close(model.classify(maps.flip(2)), model.classify(maps), DEEP)
    assert is_far(model.classify(maps.flip(3)), model.classify(maps), DEEP)
    over_time = made("lsfan:pool=sensors")  # control: there it is the other way round
    assert is_close(over_time.classify(maps.flip(3)), over_time.classify(maps), DEEP)
    assert model.attention.shown.shape == (B, H, F, F) and is_close(
        model.attention.shown.sum(-1), torch.ones(B, H, F), DEEP
    )


def test_channels_may_change_places_with_their_embeddings(x):
    """With filters of one sensor each, a permutation of channels, their statistics and embeddings changes nothing."""
    model, order = made("lsfan:reach=1"), torch.randperm(F)
    order = order if not torch.equal(order, torch.arange(F)) else order.flip(0)
    before = model(x)
    wrong = model(x[..., order])
    with torch.no_grad():
        for held in (model.where, model.scale.running_mean, model.scale.running_var):
            held.copy_(held[order].clone())
    assert is_close(model(x[..., order]), before, DEEP) and is_far(wrong, before, DEEP)


def test_any_length_of_window_will_do(x):
    model = made()
    assert model(torch.randn(1, 1, F).double()).shape == model(torch.randn(1, 77, F).double()).shape == (1, K)


def test_grad_cam_is_its_formula(x):
    model = made()
    map_, at = model.grad_cam(x)
    assert map_.shape == (B, 3, F) and (map_ >= 0).all() and torch.equal(at, model(x).argmax(1))
    maps, classify = model.features(x).detach(), torch.no_grad()(model.classify)
    for b in range(B):
        weights, step = torch.zeros(D, dtype=torch.float64), 1e-6
        for k in range(D):
            moved = maps[b : b + 1].repeat(2, 1, 1, 1)
            moved[0, k] += step
            moved[1, k] -= step
            up, down = classify(moved)[:, at[b]]
            weights[k] = (up - down) / (2 * step) / maps[b, k].numel()
        want = (weights[:, None, None] * maps[b]).sum(0).clamp(min=0)
        assert (map_[b] - want).abs().max() < 1e-7 * max(1.0, float(want.detach().max()))
        assert (map_[b] - maps[b].sum(0).clamp(min=0)).abs().max() > 1e-3


def test_parameters_are_those_of_the_formula():
    """Blocks of convolution and BN, four projections, two norms, an embedding, the MLP, the head; and statistics."""
    model = Lsfan().build(Task(), 9)
    trunk = (15 * 1 + 1 + 2) * 4 + (15 * 4 + 1 + 2) * 8
    rest = 4 * D * D + 4 * D + 2 * 2 * D + F * D + (2 * D * 9 + D + 9) + (D + 1) * K
    assert sum(p.numel() for p in model.parameters()) == trunk + rest


def test_pictures_show_where_attention_lies(x):
    model, batch = made().float(), {"inputs": x.float()}
    cam, shown = Lsfan().pictures(model, batch)
    assert len(cam.values) == F and len(cam.values[0]) == len(cam.columns) == 3 and cam.columns == ["0", "4", "8"]
    assert cam.rows == shown.columns == Task.channels
    assert all(np.std(row) > 1e-4 for row in shown.values)  # what is paid adds to 1 each
    assert is_close(torch.tensor(shown.values), model.attention.shown.mean((0, 2)), PROJECTED)
    assert len(shown.values) == H and all(abs(sum(row) - 1) < 1e-5 for row in shown.values)
    assert len(Lsfan(pool="sensors").pictures(made("lsfan:pool=sensors").float(), batch)) == 1


def test_bfloat16_runs(x):
    model = made().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x.float()).float() - model(x.float())).isfinite().all()


@pytest.mark.parametrize("spec", ["lsfan:kernel=4", "lsfan:reach=2", "lsfan:pool=frames"])
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="lsfan"):
        parse(spec)


def test_attention_alone_is_its_formula(x):
    a = SensorAttention(D, H).double()
    tokens = torch.randn(B, F, D, dtype=torch.float64)
    want = torch.stack([attention_reference(a, one) for one in tokens])
    assert is_close(a(tokens), want, PROJECTED)
    assert isinstance(made(), LSFAN) and is_far(a(tokens), a.out(a.qkv(tokens)[..., 2 * D :]), PROJECTED)
