# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on a GPU: three dtypes, all gradients against float64, every way, no waiting, same bits.

Gluon, in which the kernels for Hopper are written, has no interpreter: these are the only tests that run them. Which
calls they take is tested without a GPU in test_block_sparse_hopper.py.
"""

import pytest
import torch

import tolerance
from kernels.sparse_cases import BLOCKS_OF_128, build, errors, kernel, worst, wrong_variants
from manyheads import kernels
from manyheads.attention import patterns
from manyheads.attention.block_pattern import Rule
from manyheads.attention.sparse import Call, block_sparse_attention, choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = {"block_q": 128, "block_k": 128}
SHAPES = [
    {
        "length": 700,
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "width": 128,
        "columns": 128,
        "block_q": 128,
        "block_k": 128,
    },
    {"length": 333, "size": 500, "width": 64, "columns": 64, "block_q": 64, "block_k": 64},
    {"length": 200, "size": 300, "width": 128, "columns": 128, "block_q": 128, "block_k": 1, "density": 0.2},
    {"length": 150, "width": 80, "columns": 48, "block_q": 32, "block_k": 32, "causal": False},
    {"length": 260, "width": 256, "columns": 256, "block_q": 128, "block_k": 16, "window": 90},
    {"length": 300, "packed": [0, 5, 130, 130, 300], "width": 128, "columns": 128, "block_q": 64, "block_k": 128},
    {
        "length": 300,
        "padded": True,
        "biased": True,
        "batch": 2,
        "width": 64,
        "columns": 64,
        "block_q": 8,
        "block_k": 64,
    },
    {"length": 200, "size": 120, "width": 32, "columns": 16, "block_q": 256, "block_k": 8, "heads": 3},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(dtype, shape):
    if dtype == torch.float32:
        shape = {**shape, "width": min(shape["width"], 128), "columns": min(shape.get("columns", 16), 128)}
    case = build(**shape, dtype=dtype)
    got = kernel(case, "cuda")
    assert worst(case, got) <= 1, errors(case, got)
    twin = case.run("torch", "cuda")
    assert worst(case, twin) <= 1, errors(case, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_variants_fail(dtype):
    for given in ({"window": 70}, {"packed": [0, 70, 200]}, {"padded": True, "block_k": 1}):
        case = build(length=200, width=128, columns=128, **{"block_q": 64, "block_k": 64, **given}, dtype=dtype)
        got = kernel(case, "cuda")
        assert worst(case, got) <= 1
        for name, wrong in wrong_variants(case).items():
            assert worst(wrong, got) > 2, name


@pytest.fixture
def hopper(monkeypatch):
    """Whether this GPU is one, and the passes that its own kernels have made since."""
    from manyheads.kernels import block_sparse_hopper

    passes = []
    for name in ("forward", "backward"):
        taken = getattr(block_sparse_hopper, name)
        monkeypatch.setattr(block_sparse_hopper, name, lambda *a, n=name, f=taken: (passes.append(n), f(*a))[1])
    return block_sparse_hopper._device(torch.cuda.current_device())[0], passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS_OF_128)
def test_blocks_of_128(name, dtype, hopper):
    """What the kernels for Hopper take; elsewhere the others do. The same bits every time, or there is a race."""
    case = build(**BLOCKS_OF_128[name], dtype=dtype)
    got = kernel(case, "cuda")
    assert worst(case, got) <= 1, errors(case, got)
    on_hopper, passes = hopper
    assert set(passes) == ({"forward", "backward"} if on_hopper else set())
    for _ in range(10):
        again = case.run("triton", "cuda")
        assert all(torch.equal(again[part], x) for part, x in got.items())
    for wrong in wrong_variants(case).values() if name in ("gqa", "window") else ():
        assert worst(wrong, got) > 2


def test_ways_mix(hopper):
    """A gradient that the copy engine does not take: forward on Hopper's kernels, backward on the others."""
    on_hopper, passes = hopper
    leaves = [torch.randn(1, h, 700, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (4, 2, 2)]
    pattern = patterns.BlockPattern.from_blocks(torch.rand(1, 4, 6, 6, device="cuda") < 0.6, 700, 700)
    out = block_sparse_attention(*leaves, pattern, scale=0.1, impl="triton")
    weight = torch.randn(700, 4, 128 + 1, device="cuda", dtype=torch.bfloat16)[..., 1:].transpose(0, 1)[None]
    grads = torch.autograd.grad(out, leaves, weight, retain_graph=True)
    assert passes.count("forward") == (2 if on_hopper else 0) and passes.count("backward") <= 1  # one compiles only
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = block_sparse_attention(*wide, pattern, scale=0.1, impl="torch")
    for got, right in zip(grads, torch.autograd.grad(want, wide, weight.double()), strict=True):
        tolerance.assert_close(got.double(), right, 2 * tolerance.HALF[torch.bfloat16])
    wrong = torch.autograd.grad(out, leaves, weight.roll(1, 2).contiguous())
    assert all(tolerance.error(a.double(), b.double()) > 0.1 for a, b in zip(wrong, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_rows(dtype):
    """16 heads of 8,192 tokens at a tenth of the blocks, against the twin in float64 on some of the heads."""
    heads, length = 16, 8192
    blocks = torch.rand(1, heads, 64, 64, device="cuda") < 0.1
    q, k, v = (torch.randn(1, heads, length, 128, device="cuda", dtype=dtype) for _ in "qkv")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    pattern = patterns.BlockPattern.from_blocks(blocks, length, length)
    out = block_sparse_attention(*leaves, pattern, scale=0.1, impl="triton")
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, weight)
    few = [x.detach()[:, :2].double().requires_grad_() for x in leaves]
    some = patterns.BlockPattern.from_blocks(blocks[:, :2], length, length)
    want = block_sparse_attention(*few, some, scale=0.1, impl="torch")
    limit = tolerance.HALF[torch.bfloat16] if dtype == torch.bfloat16 else 5e-6
    tolerance.assert_close(out[:, :2].double(), want, limit)
    for got, right in zip(grads, torch.autograd.grad(want, few, weight[:, :2].double()), strict=True):
        tolerance.assert_close(got[:, :2].double(), right, 2 * limit)
    assert tolerance.error(out[:, 1:3].double(), want) > 0.1


def test_flex_and_flash_agree():
    q = torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    blocks = torch.rand(1, 4, 4, 4, device="cuda") < 0.6
    for pattern, impls in (
        (patterns.BlockPattern.from_blocks(blocks, 512, 512), ("flex", "torch")),
        (patterns.dense(512, 512, device="cuda"), ("flex", "flash", "torch")),
    ):
        want = block_sparse_attention(q, k, v, pattern, scale=0.1, lse=True, impl="triton")
        for impl in impls:
            got = block_sparse_attention(q, k, v, pattern, scale=0.1, lse=True, impl=impl)
            for a, b in zip(got, want, strict=True):
                tolerance.assert_close(a.double(), b.double(), 2 * tolerance.HALF[torch.bfloat16])
    masked = block_sparse_attention(q, k, v, pattern, scale=0.1, impl="masked")
    tolerance.assert_close(masked.double(), want[0].double(), 2 * tolerance.HALF[torch.bfloat16])


def test_what_is_chosen():
    q = torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16)

    def way(pattern, rule=None, x=q, **given):
        return choose(x, x, x, Call(pattern, rule or Rule(), 0.1), **given).impl

    full = patterns.dense(512, 512, device="cuda")
    assert way(full) == "flash"
    almost = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="cuda").tril()
    almost[..., 3, 0] = False
    assert way(patterns.BlockPattern.from_blocks(almost, 512, 512)) == "triton"  # dense attention is another function
    assert way(full, lse=True) == "flash"
    assert way(full, lse=True, x=q.detach().requires_grad_()) == "triton"
    assert way(full, rule=Rule(True, 300)) == "triton"
    assert way(full, rule=Rule(False)) == "triton"  # the upper triangle is not read
    assert way(full, x=q.float()) == "triton"
    assert way(patterns.a_shape(512, 512, 4, 100, device="cuda")) == "triton"
    odd = patterns.dense(512, 512, block_k=48, device="cuda")
    assert way(odd, rule=Rule(True, 100)) == "masked"
    assert way(odd, rule=Rule(True, 100), lse=True) == "torch"


def test_no_wait_and_the_same_bits():
    leaves = [torch.randn(1, h, 2000, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (4, 2, 2)]
    scores = torch.rand(1, 4, 16, 16, device="cuda")
    weight = torch.randn(1, 4, 2000, 128, device="cuda", dtype=torch.bfloat16)

    def run(pattern):
        out = block_sparse_attention(*leaves, pattern, scale=0.1)
        return [out, *torch.autograd.grad(out, leaves, weight)]

    held = patterns.top_k(scores, 4, 2000, 2000)
    first = run(held)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [run(held) for _ in range(10)]
        fresh = patterns.top_k(scores, 4, 2000, 2000)
        again.append([block_sparse_attention(*[x.detach() for x in leaves], fresh, scale=0.1)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for made in again:
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=False))
