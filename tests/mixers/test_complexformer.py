# SPDX-License-Identifier: Apache-2.0
"""ComplexFormer's separable form against a phase for every pair."""

import pytest
import torch

from manyheads import UserError, parse
from manyheads.attention import rope
from manyheads.attention.positions import rope_tables
from manyheads.call import MixerConfig
from manyheads.mixers.complexformer import ComplexFormer
from tolerance import DRAWN, FORMULA, assert_close, error

D, H, P = 8, 4, 4
G = 10_000.0 ** (-torch.arange(0, D, 2).double() / D)


def mixer(kv_heads=H, std=0.7, **fields):
    """A mixer with random delta and b; ``std=0`` leaves them where they start."""
    torch.manual_seed(0)
    made = ComplexFormer(**fields).build(MixerConfig(24, H, kv_heads, D, 0, 1, 16)).double().eval()
    for name, p in made.named_parameters():
        if name in ("delta", "b"):
            p.data += std * torch.randn_like(p)
        else:
            torch.nn.init.normal_(p, std=0.5)
    return made


def draw(length=9, heads=H):
    return torch.randn(2, heads, length, D, dtype=torch.float64)


def at(length, first=0):
    return torch.arange(first, first + length).expand(2, -1)


def scores(m, q, k, first=0):
    here = at(q.shape[2], first)
    seen = here.amax(1) + 1
    k = m.transform_k(k, here, seen).repeat_interleave(H // k.shape[1], 1)
    return m.transform_q(q, here, seen) @ k.mT * m.scale


def literal(m, q, k, first=0, smooth=False):
    """Scores ``[B, H, T, T]`` by the phase of every pair, ``[B, H, T, T, d/2]``."""
    k = k.repeat_interleave(H // k.shape[1], 1)
    delta = m.delta.view(-1, P).repeat_interleave(H * P // len(m.delta), 0)
    (size_q, phi_q), (size_k, phi_k) = (
        ((x[..., :P] ** 2 + x[..., P:] ** 2 + (0 if smooth else 1e-9)).sqrt(), torch.atan2(x[..., P:], x[..., :P]))
        for x in (q, k)
    )
    apart = at(q.shape[2], first)[0].double()
    semantic = phi_q[:, :, :, None] - phi_k[:, :, None]
    delta, b = (x.view(H, 1, 1, P) for x in (delta, m.b))
    semantic = semantic + delta - 1 if smooth else delta * semantic
    phase = semantic + b + (apart[:, None] - apart)[..., None] * G
    return (size_q[:, :, :, None] * size_k[:, :, None] * phase.cos()).sum(-1) * m.scale


@pytest.mark.parametrize("kv_heads", [1, 2, H])
@pytest.mark.parametrize("phase", ["atan2", "smooth"])
def test_separable_is_literal(phase, kv_heads):
    m, q, k = mixer(kv_heads, phase=phase), draw(), draw(heads=kv_heads)
    want = literal(m, q, k, smooth=phase == "smooth")
    assert_close(scores(m, q, k), want, FORMULA)
    assert error(scores(m, q, k), literal(m, q, k, smooth=phase != "smooth")) > 1e-2  # control


def test_delta_one_and_no_offset_is_rope():
    q, k = draw(), draw()
    tables = rope_tables(at(9), D, dtype=torch.float64)
    want = rope.rotate(q, tables) @ rope.rotate(k, tables).mT / D**0.5
    assert_close(scores(mixer(std=0, phase="smooth"), q, k), want, FORMULA)
    assert_close(scores(mixer(std=0), q, k), want, 2e-9)  # 1e-9 is added to the squared magnitudes
    assert error(scores(mixer(std=0, start="normal"), q, k), want) > 0.1  # control
    assert error(scores(mixer(std=0.01), q, k), want) > 1e-3


def test_delta_zero_forgets_phases():
    m = mixer()
    m.delta.data.zero_()
    q, k = draw(), draw()
    turned = [torch.cat([-x[..., P:], x[..., :P]], -1) for x in (q, k)]  # other phases, the same magnitudes
    assert_close(scores(m, turned[0], k), scores(m, q, k), FORMULA)
    assert_close(scores(m, q, turned[1]), scores(m, q, k), FORMULA)
    assert error(scores(mixer(), turned[0], k), scores(mixer(), q, k)) > 0.1  # control


@pytest.mark.parametrize("phase", ["atan2", "smooth"])
def test_shift_invariance(phase):
    m, q, k = mixer(phase=phase), draw(), draw()
    assert_close(scores(m, q, k, 7), scores(m, q, k), FORMULA)
    late = m.transform_q(q, at(9, 7), at(9).amax(1)) @ m.transform_k(k, at(9), at(9).amax(1)).mT
    assert error(late * m.scale, scores(m, q, k)) > 0.1  # control: the queries alone are moved


def test_heads_are_independent():
    m, q, k = mixer(), draw(), draw()
    before = scores(m, q, k)
    m.delta.data.view(H, P)[0] += 0.3
    m.b.data.view(H, P)[0] -= 0.2
    after = scores(m, q, k)
    assert torch.equal(after[:, 1:], before[:, 1:]) and error(after[:, :1], before[:, :1]) > 1e-2


@pytest.mark.parametrize(("delta", "phase", "jumps"), [(1, "atan2", 0), (2, "atan2", 0), (0.5, "atan2", 1),
                                                       (0.5, "smooth", 0)])  # fmt: skip
def test_what_happens_where_a_phase_wraps(delta, phase, jumps):
    m = mixer(std=0, phase=phase)
    m.delta.data.fill_(delta)
    q = torch.zeros(2, 2, H, 1, D, dtype=torch.float64)
    q[..., :P] = -1.0
    q[0, ..., P:], q[1, ..., P:] = 1e-9, -1e-9  # just above and just below the cut
    k = draw(1)
    jump = (scores(m, q[0], k) - scores(m, q[1], k)).abs().max()
    assert jump > 0.1 if jumps else jump < 1e-7


def test_gradients():
    m = mixer()
    q, k = (x[:1, :, :2].clone() for x in (draw(), draw()))
    q[..., :P], k[..., :P] = q[..., :P].abs() + 0.2, k[..., :P].abs() + 0.2  # away from zero and the cut
    delta, b = (p.detach().clone().requires_grad_() for p in (m.delta, m.b))

    def f(q, k, delta, b):
        here = at(2)[:1]
        given = {"delta": delta, "b": b}
        out = [torch.func.functional_call(Turn(m, name), {f"m.{n}": p for n, p in given.items()}, (x, here))
               for name, x in (("transform_q", q), ("transform_k", k))]  # fmt: skip
        return out[0] @ out[1].mT

    assert torch.autograd.gradcheck(f, (q.requires_grad_(), k.requires_grad_(), delta, b))


class Turn(torch.nn.Module):
    def __init__(self, m, name):
        super().__init__()
        self.m, self.name = m, name

    def forward(self, x, here):
        return getattr(self.m, self.name)(x, here, here)


@pytest.mark.parametrize("tiny", [0.0, 1e-30, 1e-6])
def test_gradients_stay_finite_where_there_is_no_phase(tiny):
    m = mixer().float()
    x = torch.full((1, H, 3, D), tiny, requires_grad=True)
    m.transform_q(x, at(3)[:1], at(3)[:1]).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 10


def test_control_of_the_gradients():
    im, re = torch.full((2, 1), 1e-12).requires_grad_().unbind()
    (grad,) = torch.autograd.grad(torch.atan2(im, re).sum() * 1e-9**0.5, im)
    assert grad > 1e6  # what would come through


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_decoding_is_one_pass(kv_heads):
    m, x = mixer(kv_heads), torch.randn(2, 23, 24, dtype=torch.float64)
    parts, state = [], None
    for piece in x.split([9, 1, 1, 12], 1):
        y, state = m(piece, state=state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), m(x)[0], FORMULA)
    assert error(torch.cat(parts, 1)[:, 9:], m(x[:, 9:])[0]) > 1e-2  # control


def test_options():
    assert mixer().scale == D**-0.5 and mixer(scale=1.0).scale == 1.0
    assert mixer(std=0).delta.eq(1).all() and mixer(std=0).b.eq(0).all()
    wide = ComplexFormer(start="normal").build(MixerConfig(64, 64, 64, 128, 0, 1, 16))
    off = abs(float(wide.delta.detach().std()) * 64**0.5 - 1) * (2 * wide.delta.numel()) ** 0.5
    assert off < DRAWN  # standard errors
    assert all(p.ndim == 1 for p in (wide.delta, wide.b))


@pytest.mark.parametrize("spec", ["complexformer:scale=0", "complexformer:theta=0"])
def test_errors(spec):
    with pytest.raises(UserError, match="positive"):
        parse(spec)
    with pytest.raises(UserError, match="pairs of channels"):
        ComplexFormer().build(MixerConfig(6, 2, 2, 3, 0, 1, 16))
