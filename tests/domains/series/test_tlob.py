# SPDX-License-Identifier: Apache-2.0
"""TLOB against its formulas in float64, written out over tokens, heads, snapshots and features."""

import math

import numpy as np
import pytest
import torch

from manyheads.attention.positions import sinusoids
from manyheads.domains.series.tlob import TLOB, BilinearNorm, Layer, Tlob
from manyheads.errors import UserError
from manyheads.spec import parse
from tolerance import DEEP, PROJECTED, error, is_close, is_far

B, S, F, D, K = 2, 12, 6, 16, 3


class Task:
    """As much of a task as the model asks for."""

    dim, layers, heads, dropout, frames = D, 2, 2, 0.0, S
    channels, classes = tuple("abcdef"), ("up", "flat", "down")


def randomised(module):
    """Every parameter drawn, so that none hides by starting at 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double().eval()


def made(spec="tlob"):
    return randomised(parse(spec).build(Task(), 9))


@pytest.fixture
def x():
    return torch.randn(B, S, F, dtype=torch.float64)


def bin_reference(norm, x):
    """Of one window ``[S, F]``, one entry at a time."""
    y1, y2 = (w.exp().log1p() for w in norm.weights)
    out = torch.zeros_like(x)
    for s in range(S):
        for f in range(F):
            column, row = x[:, f], x[s]
            over_time = norm.scale_t[f] * (x[s, f] - column.mean()) / column.std(correction=0) + norm.shift_t[f]
            over_features = norm.scale_f[s, 0] * (x[s, f] - row.mean()) / row.std(correction=0) + norm.shift_f[s, 0]
            out[s, f] = y1 * over_features + y2 * over_time
    return out


def layer_reference(layer, x):
    """Of one window's tokens ``[N, width]``, one query at a time; heads are as wide as the tokens."""
    h = x
    if layer.attend:
        n, width = x.shape
        q, k, v = layer.qkv(x).chunk(3, -1)
        mixed = torch.zeros_like(q)
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(n):
                scores = torch.stack([q[i, part] @ k[j, part] / math.sqrt(width) for j in range(n)])
                mixed[i, part] = sum(w * v[j, part] for j, w in enumerate(scores.softmax(0)))
        h = layer.norm(x + layer.w0(mixed))
    m = layer.down(torch.nn.functional.gelu(layer.up(h)))
    if m.shape[-1] != x.shape[-1]:
        return torch.nn.functional.gelu(layer.last(m))
    return torch.nn.functional.gelu(layer.last(m + h)) + x


def reference(model, x):
    """Logits of one window ``[S, F]``."""
    x = model.project(bin_reference(model.norm, x)) + sinusoids(torch.arange(S), D).double()
    for over_time, over_features in model.pairs:
        x = layer_reference(over_features, layer_reference(over_time, x).T).T
    return model.head(x.flatten())


@pytest.mark.parametrize("spec", ["tlob", "tlob:heads=2", "tlob:axes=time", "tlob:axes=features", "tlob:mixing=mlp"])
def test_the_model_is_its_formula_forward_and_backward(x, spec):
    model, grads = made(spec), []
    weights = torch.randn(B, K, dtype=torch.float64)
    for of in (lambda: model(x), lambda: torch.stack([reference(model, one) for one in x])):
        model.zero_grad()
        out = of()
        (out * weights).sum().backward()
        grads.append((out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for got, want in zip(*grads, strict=True):
        assert is_close(got, want, DEEP)
    attends = [layer.attend for pair in model.pairs for layer in pair]
    assert attends == {"tlob:axes=time": [True, False] * 2, "tlob:axes=features": [False, True] * 2,
                       "tlob:mixing=mlp": [False] * 4}.get(spec, [True] * 4)  # fmt: skip


def test_layers_take_the_axes_in_turn(x):
    """Control of the reference: without transposition, or in the other order, it is another model."""
    model = made()
    before = model(x)
    for pair in model.pairs:
        for layer in pair:
            layer.qkv.weight.data.zero_()  # all keys alike: attention is a mean
    assert is_far(model(x), before, DEEP)
    over_time, over_features = model.pair(0)
    assert over_time.norm.weight.shape == (D,) and over_features.norm.weight.shape == (S,)
    y = torch.randn(B, S, D, dtype=torch.float64)
    assert is_close(over_features(y.mT), torch.stack([layer_reference(over_features, one.T) for one in y]), DEEP)


def test_attention_of_a_layer_does_not_know_the_order_of_its_tokens():
    layer, order = randomised(Layer(D, 9, D, 2, 0.0, True)), torch.randperm(S)
    y = torch.randn(B, S, D, dtype=torch.float64)
    assert is_close(layer(y[:, order]), layer(y)[:, order], DEEP)
    assert is_close(layer.shown.sum(-1), torch.ones(B, 2, S), DEEP)
    assert is_far(
        made()(torch.randn(B, S, F, dtype=torch.float64).flip(1)), made()(torch.zeros(B, S, F).double()), DEEP
    )


def test_the_time_half_of_bin_forgets_scale_and_level_of_each_feature(x):
    norm = BilinearNorm(S, F).double()
    with torch.no_grad():
        norm.weights.copy_(torch.tensor([-60.0, math.log(math.expm1(1.0))], dtype=torch.float64))  # y1 = 0, y2 = 1
    out = norm(x)
    assert out.mean(1).abs().max() < 1e-14 and (out.std(1, correction=0) - 1).abs().max() < 1e-14
    scales, levels = torch.rand(F).double() + 0.5, torch.randn(F).double()
    assert is_close(norm(scales * x + levels), out, PROJECTED)
    both = BilinearNorm(S, F).double()  # control: the other half sees features beside each other
    assert is_far(both(scales * x + levels), both(x), PROJECTED)


def test_weights_of_bin_start_at_a_half_and_stay_above_0(x):
    norm = BilinearNorm(S, F).double()
    assert torch.nn.functional.softplus(norm.weights).tolist() == pytest.approx([0.5, 0.5], abs=1e-7)
    held = norm.weights
    torch.optim.SGD(norm.parameters(), 100.0)
    with torch.no_grad():
        norm.weights.fill_(-3.0)
    norm(x).sum().backward()
    assert (
        norm.weights is held
        and (torch.nn.functional.softplus(norm.weights) > 0).all()
        and norm.weights.grad is not None
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_a_constant_is_0_and_never_nan(x, axis):
    norm = BilinearNorm(S, F).double()
    constant = x.clone()
    constant[:, :, 2] = 7.0
    constant[:, 3, :] = 7.0
    out = norm(constant)
    assert out.isfinite().all() and norm(torch.full_like(x, 3.0)).abs().max() == 0
    assert norm(x).abs().max() > 0


def test_parameters_are_those_of_the_formula():
    width, ends = 9, [(D, S), (D // 4, S // 4)]
    count = 2 * F + 2 * S + 2 + F * D + D
    for end in ends:
        for size, out in zip((D, S), end, strict=True):
            count += 4 * size * size + 4 * size + 2 * size + size * width + width + width * out + out + 2 * out
    assert sum(p.numel() for p in Tlob().build(Task(), width).parameters()) == count + (D // 4) * (S // 4) * K + K


def test_a_long_window_ends_in_a_chain():
    class Long(Task):
        dim, frames = 48, 64

    model = Tlob().build(Long(), 9)
    assert [m.out_features for m in model.head if hasattr(m, "out_features")] == [48, 3]  # 12 * 16 = 192
    assert model(torch.randn(1, 64, F)).shape == (1, 3)


def test_pictures_show_both_attentions(x):
    time, features = Tlob().pictures(made().float(), {"inputs": x.float()})
    assert len(time.values) == 2 and len(time.values[0]) == S and len(features.values[0]) == D
    assert all(abs(np.nansum(row) - 1) < 1e-5 for row in [*time.values, *features.values])
    assert all(np.nanstd(row) > 1e-4 for row in [*time.values, *features.values])  # what is paid adds to 1 each
    assert {len(row) for row in features.values} == {D} and np.isnan(features.values[1]).sum() == D - D // 4
    (only,) = Tlob(axes="time").pictures(made("tlob:axes=time").float(), {"inputs": x.float()})
    assert only.title.startswith("attention that snapshots") and isinstance(made(), TLOB)
    assert Tlob(mixing="mlp").pictures(made("tlob:mixing=mlp").float(), {"inputs": x.float()}) == []


def test_bfloat16_runs(x):
    model = Tlob().build(Task(), 9).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x.float())
    assert out.isfinite().all() and error(out, model(x.float())) < 0.05


@pytest.mark.parametrize("spec", ["tlob:heads=0", "tlob:mixing=mlp,axes=time", "tlob:axes=levels"])
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="tlob"):
        parse(spec)
