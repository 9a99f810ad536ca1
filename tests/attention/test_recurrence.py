# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay in torch: its forms agree, it is causal, states continue it, mLSTM reduces to it."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from manyheads import UserError
from manyheads.attention.recurrence import DecayState, chunk, decay_attention, mlstm_gates, quadratic, step
from tolerance import CALL, FORMULA, assert_close, error, within

NORMS = [None, "sum", "mlstm"]
GATES = ["none", "head", "token"]


def inputs(length, *, norm=None, gate="token", batch=2, heads=4, kv_heads=2, width=8, columns=6, rows=None):
    """Arguments in float64: q, k, v, g and the rest by name."""
    q, k = (torch.randn(batch, n, length, width, dtype=torch.float64) for n in (heads, kv_heads))
    if norm == "sum":
        q, k = q.abs(), k.abs()
    v = torch.randn(batch, kv_heads, length, columns, dtype=torch.float64)
    shape = {"none": None, "head": (kv_heads,), "token": (batch, kv_heads, length)}[gate]
    g = None if shape is None else -torch.rand(shape, dtype=torch.float64)
    rest = {"scale": 0.3, "norm": norm}
    if norm == "mlstm":
        rest["floor"] = torch.rand(batch, heads, length, dtype=torch.float64) + 0.5
    kv = torch.randn(rows or batch, kv_heads, width, columns, dtype=torch.float64)
    vector = None if norm is None else torch.rand(rows or batch, kv_heads, width, dtype=torch.float64)
    return (q, k, v, g), rest | {"state": DecayState(kv, vector)}


def part(args, rest, a, b):
    """The arguments for tokens a .. b."""
    q, k, v, g = args
    gate = g if g is None or g.ndim == 1 else g[:, :, a:b]
    floor = {"floor": rest["floor"][:, :, a:b]} if "floor" in rest else {}
    return (q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], gate), rest | floor


LONG = within(torch.float64, 4 * CALL)  # up to 200 tokens, whose state is summed one by one or in parts


def same(got, want, limit=LONG):
    assert_close(got[0], want[0], limit)
    assert_close(got[1].kv, want[1].kv, limit)
    if want[1].k is not None:
        assert_close(got[1].k, want[1].k, limit)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
def test_forms_agree(norm, gate, length):
    args, rest = inputs(length, norm=norm, gate=gate)
    want = quadratic(*args, **rest)
    same(step(*args, **rest), want)
    for size in (4, 16, 64):
        same(chunk(*args, **rest, size=size), want)
    for impl in ("auto", "torch", "quadratic"):
        same(decay_attention(*args, **rest, impl=impl), want)
    if length > 1:
        for wrong in ({"scale": 0.31}, {"state": DecayState(rest["state"].kv.flip(0), rest["state"].k)}):
            if norm == "sum" and "scale" in wrong:
                continue  # divides the scale away
            assert error(step(*args, **rest | wrong)[0], want[0]) > 1e-4
        if gate == "token":
            late = (*args[:3], args[3].roll(1, -1))
            assert error(step(*late, **rest)[0], want[0]) > 1e-4


def test_the_definition():
    """The first two tokens by hand, and float32 in float32 or better."""
    (q, k, v, g), _ = inputs(2, batch=1, heads=1, kv_heads=1)
    out, state = quadratic(q, k, v, g, scale=0.3)
    first, second = (k[0, 0, t, :, None] * v[0, 0, t] for t in range(2))
    assert_close(out[0, 0, 0], 0.3 * q[0, 0, 0] @ first, FORMULA)
    assert_close(state.kv[0, 0], g[0, 0, 1].exp() * first + second, FORMULA)
    assert_close(out[0, 0, 1], 0.3 * q[0, 0, 1] @ state.kv[0, 0], FORMULA)
    half = [x.bfloat16() for x in (q, k, v)]
    low, kept = quadratic(*half, g.float())
    assert low.dtype == torch.bfloat16 and kept.kv.dtype == torch.float32
    assert_close(low.float(), quadratic(*(x.float() for x in half), g.float())[0].bfloat16().float(), 1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", ["head", "token"])
@pytest.mark.parametrize("form", [quadratic, step, lambda *args, **rest: chunk(*args, **rest, size=3)])
def test_gradients(norm, gate, form):
    """Of all inputs, through the output and the final state."""
    args, rest = inputs(7, norm=norm, gate=gate, batch=1, heads=2, kv_heads=1, width=3, columns=2)
    state = rest.pop("state")
    floor = [rest.pop("floor")] if norm == "mlstm" else []

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        kv, *more = leaves[4 + len(floor) :]
        given = {"floor": leaves[4]} if floor else {}
        out, after = form(*leaves[:4], **rest, **given, state=DecayState(kv, more[0] if more else None))
        return (out, after.kv) if after.k is None else (out, after.kv, after.k)

    leaves = [*args, *floor, state.kv, *([] if state.k is None else [state.k])]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(NORMS), st.sampled_from(GATES))
def test_split_anywhere(a, b, norm, gate):
    args, rest = inputs(a + b, norm=norm, gate=gate)
    want = chunk(*args, **rest, size=16)
    (first, more_first), (second, more_second) = part(args, rest, 0, a), part(args, rest, a, a + b)
    head, state = chunk(*first, **more_first, size=16)
    tail, after = chunk(*second, **more_second | {"state": state}, size=16)
    same((torch.cat([head, tail], 2), after), want)
    lost, _ = chunk(*second, **more_second, size=16)  # starts from the old state again
    assert error(lost, want[0][:, :, a:]) > 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [[0, 9], [0, 3, 10, 30], [0, 0, 5, 5, 90]])
def test_packed_is_apart(norm, bounds):
    args, rest = inputs(bounds[-1], norm=norm, batch=1, rows=len(bounds) - 1)
    out, after = decay_attention(*args, **rest, cu_seqlens=torch.tensor(bounds))
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        before = rest["state"].reorder(torch.tensor([n]))
        if a == b:
            assert torch.equal(after.kv[n], before.kv[0])
            continue
        some, given_some = part(args, rest, a, b)
        alone, state = quadratic(*some, **given_some | {"state": before})
        assert_close(out[:, :, a:b], alone, LONG)
        assert_close(after.kv[n], state.kv[0], LONG)
    if len(bounds) == 4:
        moved, _ = decay_attention(*args, **rest, cu_seqlens=torch.tensor([0, 4, 10, 30]))
        assert error(moved, out) > 1e-3


def test_limits_of_the_decay():
    """No decay is plain causal linear attention; full decay leaves the token itself."""
    (q, k, v, _), _ = inputs(40, heads=2)
    plain = ((q @ k.transpose(-1, -2)).tril()) @ v
    alone = (q * k).sum(-1, keepdim=True) * v
    for form in (quadratic, step, chunk):
        assert_close(form(q, k, v)[0], plain, FORMULA)
        assert_close(form(q, k, v, q.new_zeros(2))[0], plain, FORMULA)
        assert_close(form(q, k, v, torch.full((2, 2, 40), -1e4).double())[0], alone, FORMULA)
        assert error(form(q, k, v, torch.full((2,), -1.0).double())[0], alone) > 0.1


def test_channels_of_v_are_apart_and_time_is_relative():
    args, _ = inputs(20)
    order = torch.randperm(6)
    q, k, v, g = args
    out = chunk(*args, scale=0.3, size=8)[0]
    assert_close(chunk(q, k, v[..., order], g, scale=0.3, size=8)[0], out[..., order], FORMULA)
    later = [torch.cat([x.new_zeros(*x.shape[:2], 5, *x.shape[3:]), x], 2) for x in args]
    assert_close(chunk(*later, scale=0.3, size=8)[0][:, :, 5:], out, FORMULA)


@pytest.mark.parametrize("form", [quadratic, step, lambda *args, **rest: chunk(*args, **rest, size=4)])
@pytest.mark.parametrize("norm", NORMS)
def test_causal(form, norm):
    """Token 9 changes nothing before it, and itself at least."""
    args, rest = inputs(20, norm=norm)
    want = form(*args, **rest)[0]
    for i in range(4):
        changed = list(args)
        changed[i] = args[i].clone()
        changed[i][:, :, 9] = changed[i][:, :, 9] * 1.5 - 0.1
        got = form(*changed, **rest)[0]
        assert torch.equal(got[:, :, :9], want[:, :, :9])
        assert error(got[:, :, 9], want[:, :, 9]) > 1e-6


# mLSTM


def literal(q, k, v, i, f, m, kv, n, scale):
    """The stabilised recurrence of xLSTM (arXiv 2405.04517, eq. 19 ff.), a token at a time, through m and all."""
    out = []
    for t in range(q.shape[2]):
        forget = torch.nn.functional.logsigmoid(f[:, :, t])
        new = torch.maximum(forget + m, i[:, :, t])
        old, fresh = (forget + m - new).exp(), (i[:, :, t] - new).exp()
        m = new
        kv = old[..., None, None] * kv + fresh[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        n = old[..., None] * n + fresh[..., None] * k[:, :, t]
        below = torch.maximum((scale * q[:, :, t] * n).sum(-1).abs(), (-m).exp())
        out.append(scale * (q[:, :, t, None] @ kv)[:, :, 0] / (below + 1e-6)[..., None])
    return torch.stack(out, 2), m, kv, n


def reduced(q, k, v, i, f, state=None, scale=0.3, form=quadratic):
    g, factor, floor, m = mlstm_gates(i, f, state)
    out, after = form(q, k * factor[..., None], v, g, scale=scale, norm="mlstm", floor=floor, state=state)
    return out, DecayState(after.kv, after.k, m)


def mlstm_inputs(length=12):
    q, k, v = (torch.randn(2, 2, length, 5, dtype=torch.float64) for _ in "qkv")
    i, f = (torch.randn(2, 2, length, dtype=torch.float64) * 2 for _ in "if")
    return [x.requires_grad_() for x in (q, k, v, i, f + 1)]


@pytest.mark.parametrize("form", [quadratic, step, lambda *args, **rest: chunk(*args, **rest, size=4)])
def test_mlstm_is_the_literal_recurrence(form):
    """Output, state and all gradients, although the running maximum has no gradient here."""
    leaves = mlstm_inputs()
    zero = leaves[0].new_zeros(2, 2)
    want, m, kv, n = literal(*leaves, zero, zero.new_zeros(2, 2, 5, 5), zero.new_zeros(2, 2, 5), 0.3)
    got, after = reduced(*leaves, form=form)
    for a, b in ((got, want), (after.kv, kv), (after.k, n), (after.m, m)):
        assert_close(a, b, LONG)
    weight = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weight).sum(), leaves)
    grads = torch.autograd.grad((got * weight).sum(), leaves)
    # The constant 1e-6 below the fraction is not scaled with m, so that the output depends on m by as much.
    for a, b in zip(grads, wanted, strict=True):
        assert_close(a, b, 1e-5)
    g, _, floor, _ = mlstm_gates(leaves[3], leaves[4])
    wrong, _ = quadratic(leaves[0], leaves[1], leaves[2], g, scale=0.3, norm="mlstm", floor=floor)
    assert error(wrong, want) > 0.01  # without the factor


def test_mlstm_continues():
    leaves = [x.detach() for x in mlstm_inputs()]
    want, final = reduced(*leaves)
    head, state = reduced(*(x[:, :, :5] for x in leaves))
    tail, after = reduced(*(x[:, :, 5:] for x in leaves), state=state)
    same((torch.cat([head, tail], 2), after), (want, final))
    assert_close(after.m, final.m, LONG)
    lost, _ = reduced(*(x[:, :, 5:] for x in leaves), state=DecayState(state.kv, state.k))  # without m
    assert error(lost, want[:, :, 5:]) > 1e-3


def test_mlstm_does_not_depend_on_the_first_maximum():
    leaves = [x.detach() for x in mlstm_inputs()]
    zero = leaves[0].new_zeros(2, 2, 5, 5)
    outs = [
        reduced(*leaves, state=DecayState(zero, zero[..., 0], torch.full((2, 2), first).double()))[0]
        for first in (0.0, -1e9, 3.0)
    ]
    assert_close(outs[1], outs[0], 5e-8)  # up to the 1e-6 below the fraction, times exp(m)
    assert_close(outs[2], outs[0], 3e-6)
    assert error(reduced(*leaves[:3], leaves[3] + 1, leaves[4])[0], outs[0]) > 1e-2


def test_mlstm_hides_and_floods():
    """i = -inf: a token that is not there. i = +80: the output is its value, also in float32."""
    q, k, v, i, f = (x.detach() for x in mlstm_inputs())
    i, f = i.clone(), f.clone()
    i[:, :, 4], f[:, :, 4] = -torch.inf, torch.inf  # written nothing, forgot nothing
    rest = [0, 1, 2, 3, *range(5, 12)]
    with_it, without = reduced(q, k, v, i, f)[0], reduced(*(x[:, :, rest] for x in (q, k, v, i, f)))[0]
    assert_close(with_it[:, :, rest], without, FORMULA)
    i[:, :, 4] = 0.0
    assert error(reduced(q, k, v, i, f)[0][:, :, rest], without) > 1e-3
    i[:, :, 7] = 80.0
    sign = (q[:, :, 7] * k[:, :, 7]).sum(-1, keepdim=True).sign()  # |q n| below, q n above
    for form in (quadratic, step, chunk):
        out, after = reduced(*(x.float() for x in (q, k, v, i, f)), form=form)
        assert out.isfinite().all() and after.kv.isfinite().all()
        assert error(out[:, :, 7].double(), v[:, :, 7] * sign) < 2e-5
    q1, k1 = torch.ones(1, 1, 3, 4).double(), torch.rand(1, 1, 3, 4).double()
    v1 = torch.randn(1, 1, 3, 4).double()
    free, _ = reduced(q1, k1, v1, torch.zeros(1, 1, 3).double(), torch.full((1, 1, 3), torch.inf).double(), scale=1.0)
    weights = (q1 @ k1.transpose(-1, -2)).tril()
    assert_close(free, weights @ v1 / (weights.sum(-1, keepdim=True).clamp(min=1) + 1e-6), FORMULA)


# States and errors


def test_state():
    state = DecayState(torch.randn(3, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 4), torch.randn(3, 2))
    rows = torch.tensor([2, 2, 0])
    moved = state.reorder(rows)
    assert torch.equal(moved.kv, state.kv[rows]) and torch.equal(moved.k, state.k[rows])
    assert torch.equal(moved.m, state.m[rows]) and moved.kv.requires_grad
    assert not state.detach().kv.requires_grad and state.nbytes == 4 * (3 * 2 * 4 * 5 + 3 * 2 * 4 + 3 * 2)
    bare = DecayState(state.kv)
    assert bare.reorder(rows).k is None and bare.detach().m is None and bare.nbytes == 4 * 120


def test_strangers_are_refused():
    (q, k, v, g), rest = inputs(5, norm="mlstm")
    right = {"q": q, "k": k, "v": v, "g": g} | rest
    decay_attention(**right)
    for wrong, words in (
        ({"k": k[..., :-1]}, "do not belong"),
        ({"v": v[:, :, 1:]}, "do not belong"),
        ({"q": q[:, :3]}, "do not belong"),
        ({"g": g[:, :, 1:]}, "neither"),
        ({"floor": None}, "floor"),
        ({"norm": "sum"}, "floor"),
        ({"floor": rest["floor"][:, :2]}, "floor"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "one row"),
        ({"state": rest["state"].reorder(torch.tensor([0]))}, "state"),
    ):
        with pytest.raises(UserError, match=words):
            decay_attention(**right | wrong)
