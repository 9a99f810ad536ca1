# SPDX-License-Identifier: Apache-2.0
"""CoCA's pre-transforms against the literal form over all pairs of positions."""

import math

import pytest
import torch

from manyheads import UserError, parse
from manyheads.attention.reference import causal_mask
from manyheads.call import MixerConfig
from manyheads.mixers.coca import CoCA
from tolerance import FORMULA, SAME, assert_close, error, within

D, H = 8, 4


def mixer(kv_heads=2, **fields):
    torch.manual_seed(0)
    made = CoCA(**fields).build(MixerConfig(24, H, kv_heads, D, 0, 1, 16)).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def turned(x, position):
    """``x [..., d]`` turned to one position, in complex numbers."""
    angle = position * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def literal(q, w, form, first=0):
    """Scores ``[T, T]`` of one head from ``q, w = W_T x [T, d]``: a key ``q_m * t_n`` for every pair."""
    half = ((w[:, : D // 2] + w[:, D // 2 :]) / 2).clamp(min=0)
    t = torch.cat([half, half], -1)
    scores = torch.empty(len(q), len(q), dtype=q.dtype)
    for m in range(len(q)):
        for n in range(len(q)):
            key = turned(q[m] * t[n], first + n) if form == "strict" else q[m] * turned(t[n], first + n)
            scores[m, n] = turned(q[m], first + m) @ key
    return scores


def scores(m, q, w, first=0):
    """The same by the mixer's transforms."""
    at = torch.arange(first, first + len(q))[None]
    seen = at.amax(1) + 1
    return (m.transform_q(q[None, None], at, seen) @ m.transform_k(w[None, None], at, seen).mT)[0, 0]


def draw(length=7):
    return torch.randn(2, length, D, dtype=torch.float64).unbind()


@pytest.mark.parametrize("form", ["slack", "strict"])
def test_transforms_are_the_literal_form(form):
    q, w = draw()
    assert_close(scores(mixer(form=form), q, w), literal(q, w, form), FORMULA)
    other = "strict" if form == "slack" else "slack"
    assert error(scores(mixer(form=form), q, w), literal(q, w, other)) > 1e-2  # control


@pytest.mark.parametrize("form", ["slack", "strict"])
def test_the_mixer_is_attention_with_literal_scores(form):
    m, x = mixer(form=form), torch.randn(2, 9, 24, dtype=torch.float64)
    q, w, v = (p(x).unflatten(-1, (-1, D)) for p in (m.q_proj, m.k_proj, m.v_proj))
    rows = []
    for b in range(2):
        heads = []
        for h in range(H):
            a = literal(q[b, :, h], w[b, :, h // 2], form) / math.sqrt(D)
            heads.append(a.masked_fill(~causal_mask(9, 9), -torch.inf).softmax(-1) @ v[b, :, h // 2])
        rows.append(m.out_proj(torch.cat(heads, -1)))
    assert_close(m(x)[0], torch.stack(rows), FORMULA)


def test_strict_is_shift_invariant_and_slack_is_not():
    q, w = draw()
    assert_close(scores(mixer(form="strict"), q, w, 7), scores(mixer(form="strict"), q, w), FORMULA)
    assert error(scores(mixer(form="slack"), q, w, 7), scores(mixer(form="slack"), q, w)) > 0.1


def test_they_agree_where_the_halves_of_q_are_equal():
    q, w = draw()
    q = torch.cat([q[:, : D // 2]] * 2, -1)
    assert_close(scores(mixer(form="slack"), q, w), scores(mixer(form="strict"), q, w), FORMULA)
    q[:, 0] += 0.5  # control
    assert error(scores(mixer(form="slack"), q, w), scores(mixer(form="strict"), q, w)) > 1e-3


def test_the_score_is_highest_at_no_distance():
    q, w = draw(1)
    t = ((w[:, : D // 2] + w[:, D // 2 :]) / 2).relu()
    at = torch.arange(60)[None]
    m = mixer(form="strict")
    key = m.transform_k(w.expand(60, -1)[None, None], at, at.amax(1) + 1)
    query = m.transform_q(q.expand(60, -1)[None, None], at, at.amax(1) + 1)
    a = (query @ key.mT)[0, 0]
    start = (t * (q[:, : D // 2] ** 2 + q[:, D // 2 :] ** 2)).sum()
    assert_close(a.diagonal(), start.expand(60), FORMULA)
    assert bool((a <= start + 1e-9).all()) and start > 0


def test_one_plane_is_a_cosine_of_the_offset():
    q = torch.randn(12, D, dtype=torch.float64)
    w = torch.full((12, D), -1.0, dtype=torch.float64)
    w[:, [1, 1 + D // 2]] = 2.0
    a = scores(mixer(form="strict"), q, w)
    apart = torch.arange(12).double()
    cosine = torch.cos((apart[:, None] - apart) * 10_000.0 ** (-2 / D))
    assert_close(a, 2 * (q[:, 1] ** 2 + q[:, 1 + D // 2] ** 2)[:, None] * cosine, FORMULA)


@pytest.mark.parametrize("form", ["slack", "strict"])
def test_planes_that_relu_closes_get_no_gradient(form):
    q, w = draw()
    w = torch.where(torch.arange(D) % 4 == 1, -w.abs(), w.abs()).requires_grad_()  # plane 1 is closed
    scores(mixer(form=form), q, w).square().sum().backward()
    assert w.grad[:, [1, 1 + D // 2]].eq(0).all() and w.grad[:, [0, D // 2]].ne(0).all()


@pytest.mark.parametrize("form", ["slack", "strict"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_decoding_is_one_pass(form, kv_heads):
    m, x = mixer(kv_heads, form=form), torch.randn(2, 23, 24, dtype=torch.float64)
    parts, state = [], None
    for piece in x.split([9, 1, 1, 12], 1):
        y, state = m(piece, state=state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), m(x)[0], FORMULA)
    late = m(x[:, 9:])[0]  # control: forgetting what came before
    assert error(torch.cat(parts, 1)[:, 9:], late) > 1e-2


def test_float32_and_bfloat16():
    m, x = mixer(), torch.randn(2, 300, 24, dtype=torch.float64)
    want = m(x)[0]
    assert_close(m.float()(x.float())[0], want, SAME)
    assert_close(m.bfloat16()(x.bfloat16())[0], want, within(torch.bfloat16))


def test_ntk_changes_nothing_up_to_the_trained_length():
    x = torch.randn(1, 33, 24, dtype=torch.float64)
    for form in ("slack", "strict"):
        short, long = ([mixer(form=form, ntk=n)(x[:, :length])[0] for n in (0.0, 2.0)] for length in (16, 33))
        assert torch.equal(*short) and error(*long) > 1e-3


def test_ntk_is_a_larger_base():
    x = torch.randn(1, 33, 24, dtype=torch.float64)
    base = 10_000.0 * (4 * 33 / 16 - 3) ** (D / (D - 2))
    assert_close(mixer(ntk=4)(x)[0], mixer(theta=base)(x)[0], FORMULA)
    assert error(mixer(ntk=2)(x)[0], mixer(theta=base)(x)[0]) > 1e-4  # control


@pytest.mark.parametrize(("spec", "says"), [("coca:ntk=0.5", "at least 1"), ("coca:theta=0", "positive")])
def test_errors(spec, says):
    with pytest.raises(UserError, match=says):
        parse(spec)
    with pytest.raises(UserError, match="pairs of channels"):
        CoCA().build(MixerConfig(6, 2, 2, 3, 0, 1, 16))
