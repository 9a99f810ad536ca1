# SPDX-License-Identifier: Apache-2.0
"""Decay attention on a GPU: three dtypes, all gradients against float64, long sequences, torch.compile, no waiting.

Triton 3.4 to 3.7.0 miscompiles, on Hopper, a transposed use of a product that was cast to 16 bits; the gradients below
would show it.
"""

import itertools

import pytest
import torch

import tolerance
from kernels import decay_cases
from kernels.decay_cases import build, errors, kernel, worst, wrong_variants
from manyheads import kernels
from manyheads.attention.recurrence import DecayState, decay_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    {"length": 200, "batch": 2, "heads": 4, "kv_heads": 2, "width": 128, "columns": 128},
    {"length": 65, "heads": 2, "kv_heads": 2, "width": 16, "columns": 48},
    {"length": 1000, "heads": 1, "width": 64, "columns": 128},
    {"length": 130, "heads": 3, "width": 80, "columns": 96, "start": False},
    {"length": 300, "heads": 1, "width": 256, "columns": 256, "final": False},
    {"packed": [0, 5, 6, 75, 75, 400], "heads": 4, "width": 128, "columns": 64},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "sum", "mlstm"])
@pytest.mark.parametrize("gate", ["none", "head", "token"])
def test_formula(dtype, norm, gate):
    for shape in SHAPES:
        case = build(**shape, dtype=dtype, norm=norm, gate=gate)
        got = kernel(case, "cuda")
        assert worst(case, got, "cuda") <= 1, (shape, errors(case, got, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_lengths(dtype, length):
    case = build(length=length, width=64, columns=64, norm="mlstm", dtype=dtype)
    got = kernel(case, "cuda")
    assert worst(case, got, "cuda") <= 1, errors(case, got, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "overlap"), [(None, True), (None, False), ("sum", False), ("mlstm", False)])
def test_shares_of_a_sequence(dtype, norm, overlap, monkeypatch):
    """Three shares that pass on one state are the whole; without what comes on the way back they are not."""
    case = build(length=1000, batch=2, heads=4, kv_heads=2, width=128, columns=128, dtype=dtype, norm=norm)
    for lost in (False, True):
        line = decay_cases.Line(lost)
        monkeypatch.setattr(decay_cases, "decay_attention", decay_cases.in_shares([300, 813], overlap, line))
        got = kernel(case, "cuda")
        assert (worst(case, got, "cuda") > 2) if lost else (worst(case, got, "cuda") <= 1), errors(case, got, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_variants_fail(dtype):
    for shape in ({"length": 100, "batch": 2, "norm": "mlstm"}, {"packed": [0, 70, 200], "norm": None}):
        case = build(**shape, width=128, columns=128, dtype=dtype)
        got = kernel(case, "cuda")
        assert worst(case, got, "cuda") <= 1
        for name, wrong in wrong_variants(case).items():
            assert worst(wrong, got, "cuda") > 2, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "mlstm"])
def test_gradients_of_long_sequences(dtype, norm):
    """Several segments of many chunks each; gates near 0, so that the states matter."""
    case = build(length=4096, batch=2, heads=4, kv_heads=4, width=128, columns=128, norm=norm, dtype=dtype)
    case = case.but(g=case.given["g"] / 200)
    got = kernel(case, "cuda")
    assert worst(case, got, "cuda") <= 1, errors(case, got, "cuda")


def test_more_than_2_31_numbers():
    """The ends of 1.1 million tokens of 16 heads, against torch on them alone: the decay forgets the middle."""
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB")
    length, cut, heads = 1_100_000, 2048, 16
    q, k, v = (torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    assert q.numel() > 2**31
    g = torch.linspace(-0.1, -1, heads, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, state = decay_attention(*leaves, g, scale=0.1, impl="triton")
    weight = torch.randn(128, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    for part, kept in (
        (slice(0, cut), slice(0, cut // 2)),
        (slice(length - cut, length), slice(cut // 2, cut)),
    ):
        few = [x.detach()[:, :, part].float().requires_grad_() for x in leaves]
        want, after = decay_attention(*few, g, scale=0.1, impl="torch")
        wanted = torch.autograd.grad((want * weight.float()).sum(), few)
        limit = tolerance.HALF[torch.bfloat16]
        tolerance.assert_close(out[:, :, part][:, :, kept].float(), want[:, :, kept], limit)
        for got, right in zip(grads, wanted, strict=True):
            tolerance.assert_close(got[:, :, part][:, :, kept].float(), right[:, :, kept], 2 * limit)
        assert tolerance.error(out[:, :, 1:][:, :, part][:, :, : cut // 2].float(), want[:, :, : cut // 2]) > 0.1
    tolerance.assert_close(state.kv, after.kv, limit)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """One graph without a break, for several lengths, with all gradients."""

    def call(q, k, v, g, floor, kv, n):
        out, after = decay_attention(
            q * 1.0, k, v, g, scale=0.1, norm="mlstm", floor=floor, state=DecayState(kv, n), impl="triton"
        )
        return out * 2, after.kv, after.k

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for length in (70, 200, 333):
        case = build(length=length, batch=2, heads=4, kv_heads=2, width=64, columns=128, norm="mlstm")
        made = []
        for form in (call, compiled):
            leaves = [x.cuda() for x in case.given.values()]
            leaves[:3] = [x.bfloat16() for x in leaves[:3]]
            leaves = [x.requires_grad_() for x in leaves]
            outs = form(*leaves)
            made.append([*outs, *torch.autograd.grad(sum(x.float().square().sum() for x in outs), leaves)])
        for got, want in zip(made[1], made[0], strict=True):
            tolerance.assert_close(got.detach(), want.detach(), 1e-2)
        assert tolerance.error(made[1][0].detach(), 1.1 * made[0][0].detach()) > 0.05


@pytest.mark.parametrize("norm", [None, "sum", "mlstm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_continue_a_prefix(norm, dtype):
    """A prefix by the kernel for many tokens, then tokens one by one."""
    case = build(length=80, batch=3, heads=8, kv_heads=2, width=128, columns=96, norm=norm, dtype=dtype)
    want = case.run("quadratic", torch.float64)
    q, k, v, g, floor, kv, n = (None if x is None else x.cuda() for x in case.given.values())
    q, k, v = (x.to(dtype) for x in (q, k, v))
    state, outs = DecayState(kv, n), []
    for a, b in itertools.pairwise([0, 70, *range(71, 81)]):
        here = {} if floor is None else {"floor": floor[:, :, a:b]}
        out, state = decay_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], g[:, :, a:b], scale=case.scale, norm=norm, state=state, **here
        )
        outs.append(out)
    limit = 5 * tolerance.HALF[torch.float32] if dtype == torch.float32 else tolerance.HALF[dtype]
    tolerance.assert_close(torch.cat(outs, 2).cpu(), want["out"], limit)
    tolerance.assert_close(state.kv.cpu(), want["state"], limit)
    assert tolerance.error(outs[-1].cpu(), want["out"][:, :, -2:-1]) > 0.1


def test_no_wait_and_the_same_bits():
    case = build(packed=[0, 300, 301, 2000], heads=4, kv_heads=2, width=128, columns=128, norm="mlstm")
    leaves = [x.cuda() for x in case.given.values()]
    leaves[:3] = [x.bfloat16() for x in leaves[:3]]
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v, g, floor, kv, n = leaves
    bounds = case.cu_seqlens.cuda()

    def run():
        out, after = decay_attention(
            q, k, v, g, scale=0.1, norm="mlstm", floor=floor, state=DecayState(kv, n), cu_seqlens=bounds, impl="triton"
        )
        return [out, after.kv, *torch.autograd.grad(out.float().sum() + after.kv.sum(), leaves)]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [run() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for made in again:
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True))
