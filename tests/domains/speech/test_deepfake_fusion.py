# SPDX-License-Identifier: Apache-2.0
"""Fusions of two views against their formulas in float64, and the cases in which one view is left."""

import math
from types import SimpleNamespace

import pytest
import torch

from manyheads.domains.speech.deepfake_fusion import CrossAttention, DeepfakeFusion, Fusion, aligned
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.speech.speech_deepfakes import Detector
from tolerance import DEEP, FORMULA, PROJECTED, is_close, is_far

B, T, F, D, H, SIZES = 2, 6, 11, 8, 2, (12, 5)
KINDS = ("concat", "cross", "mutual", "gate")


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double().eval()


@pytest.fixture
def views():
    torch.manual_seed(0)
    return torch.randn(B, T, SIZES[0], dtype=torch.float64), torch.randn(B, F, SIZES[1], dtype=torch.float64)


def fusion(kind):
    torch.manual_seed(1)
    return randomised(Fusion(SIZES, D, H, 0.0, kind))


def normed(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def asked(layer, x, y):
    """LN(x + MHA(x, y, y)), one query and one head at a time."""
    a, d = layer.attention, D // H
    w, b = a.in_proj_weight.split(D), a.in_proj_bias.split(D)
    q, k, v = x @ w[0].T + b[0], y @ w[1].T + b[1], y @ w[2].T + b[2]
    out = torch.zeros_like(q)
    for n in range(len(x)):
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            for i in range(x.shape[1]):
                weights = torch.stack([q[n, i, part] @ k[n, j, part] / math.sqrt(d) for j in range(y.shape[1])])
                out[n, i, part] = weights.softmax(0) @ v[n, :, part]
    return normed(x + out @ a.out_proj.weight.T + a.out_proj.bias, layer.norm)


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def reference(m, s, c):
    """The four formulas of the docstring."""
    s, c = (linear(normed(x, p[0]), p[1]) for x, p in zip((s, c), m.project, strict=True))
    at = torch.linspace(0, F - 1, T, dtype=torch.float64)
    low = at.floor().long().clamp(max=F - 2)
    c = c[:, low] + (at - low)[:, None] * (c[:, low + 1] - c[:, low])
    if m.kind == "concat":
        return linear(torch.cat((s, c), -1), m.join)
    if m.kind == "cross":
        return asked(m.ask[0], s, c)
    if m.kind == "mutual":
        return linear(torch.cat((asked(m.ask[0], s, c), asked(m.ask[1], c, s)), -1), m.join)
    share = 1 / (1 + torch.exp(-linear(torch.cat((s, c), -1), m.join)))
    return share * s + (1 - share) * c


@pytest.mark.parametrize("kind", KINDS)
def test_a_fusion_is_its_formula_forward_and_backward(kind, views):
    m, grads = fusion(kind), []
    weights = torch.randn(B, T, D, dtype=torch.float64)
    for of in (m, lambda s, c: reference(m, s, c)):
        m.zero_grad()
        out = of(*views)
        (out * weights).sum().backward()
        grads.append([out.detach(), *(p.grad.clone() for p in m.parameters())])
    for got, want in zip(*grads, strict=True):
        assert is_close(got, want, DEEP) or float(want.norm()) < 1e-12  # keys' bias moves nothing
    turned = m(views[0], views[1].flip(1))  # control: the other view, and its order where frames are aligned
    assert is_far(turned, grads[1][0], DEEP) == (kind != "cross")
    assert is_far(m(views[0], views[1] + torch.randn(B, F, SIZES[1])), grads[1][0], DEEP)


def test_frames_are_aligned_linearly():
    ramp = torch.arange(F, dtype=torch.float64)[None, :, None]
    for length in (1, 2, 5, F, 40):
        want = torch.linspace(0, F - 1, length, dtype=torch.float64)
        assert is_close(aligned(ramp, length)[0, :, 0], want, FORMULA) if length > 1 else True
        assert aligned(ramp, length).shape == (1, length, 1)
    assert is_far(torch.nn.functional.interpolate(ramp.mT, 5).mT[0, :, 0], aligned(ramp, 5)[0, :, 0], FORMULA)


def test_an_open_gate_is_one_view_and_a_shut_one_the_other(views):
    m = fusion("gate")
    s, c = m.views(*views)
    for bias, want, other in ((1e3, s, c), (-1e3, c, s)):
        with torch.no_grad():
            m.join.bias.fill_(bias)
        assert torch.equal(m(*views), want) and is_far(m(*views), other, FORMULA)


def test_a_concatenation_that_ignores_a_view_is_the_other(views):
    m = fusion("concat")
    with torch.no_grad():
        m.join.weight[:, D:] = 0
    s, _ = m.views(*views)
    assert is_close(m(*views), s @ m.join.weight[:, :D].T + m.join.bias, PROJECTED)
    assert torch.equal(m(*views), m(views[0], views[1] + 1.5))


def test_mutual_attention_is_two_calls_with_roles_swapped(views):
    m = fusion("mutual")
    s, c = m.views(*views)
    first, second = m.ask
    assert is_close(m(*views), m.join(torch.cat((first(s, c), second(c, s)), -1)), PROJECTED)
    assert is_far(m(*views), m.join(torch.cat((first(s, c), second(s, c)), -1)), PROJECTED)


def test_attention_to_one_frame_adds_its_value():
    layer = randomised(CrossAttention(D, H, 0.0))
    x, y = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, 1, D, dtype=torch.float64)
    a = layer.attention
    value = y @ a.in_proj_weight[2 * D :].T + a.in_proj_bias[2 * D :]
    assert is_close(layer(x, y), layer.norm(x + a.out_proj(value)), PROJECTED)


class Task:
    """As much of a task as the recipe asks for."""

    dim, layers, heads, dropout = D, 1, H, 0.0

    def reference(self, width, kind=""):
        return Detector(SimpleNamespace(dim=D, layers=1, dropout=0.0), width)


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_is_the_reference_with_another_front(kind):
    recipe = DeepfakeFusion(fusion=kind)
    model, plain = recipe.build(Task(), 16), Task().reference(16)
    own = {name: p.shape for name, p in model.named_parameters() if not name.startswith("fuse")}
    assert own == {name: p.shape for name, p in plain.named_parameters() if not name.startswith("fuse")}
    s, c = torch.randn(B, T, 384), torch.randn(B, F, 60)
    before = model.eval()(s, c)
    assert before.shape == (B, 1) and is_far(model(s, c + torch.randn_like(c)), before, PROJECTED)
    pictures = recipe.pictures(model, {"inputs": s, "spectral": c})
    assert len(pictures) == (kind != "concat") and torch.equal(model(s, c), before)
    if kind in ("cross", "mutual"):
        (picture,) = pictures
        assert [sum(row) for row in picture.values] == pytest.approx([1.0] * T)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(s, c).isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="deepfake_fusion"):
        parse("deepfake_fusion:fusion=sum")
    assert parse("deepfake_fusion").fusion == "cross"
