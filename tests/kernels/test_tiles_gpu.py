# SPDX-License-Identifier: Apache-2.0
"""Tiles with bits on a GPU: three dtypes against float64, what is chosen, no waiting in a step, the same bits again."""

import pytest
import torch

import tolerance
from kernels.tile_cases import build, flipped, kernel, worst
from manyheads import kernels
from manyheads.attention.tile_pattern import TilePattern
from manyheads.parallel import PATTERNS, AttnMask, layout, pattern
from manyheads.parallel import _partial as part
from manyheads.parallel._tiles import tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    {"width": 128, "kv_heads": 2, "group": 4},
    {"width": 64, "size": 513, "how": "zigzag", "name": "document_causal", "batch": 2},
    {"width": 80, "columns": 48, "size": 601, "how": "striped", "name": "prefix", "group": 2},
    {"width": 256, "size": 400, "name": "window"},
    {"width": 16, "size": 129, "name": "shared_question"},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, dtype):
    if dtype == torch.float32:
        shape = {**shape, "width": min(shape["width"], 128)}
    case = build(**{"size": 700, **shape}, dtype=dtype)
    got = kernel(case, "cuda")
    assert worst(case, got) <= 1
    assert worst(case, case.run("torch", "cuda")) <= 1
    again = kernel(case, "cuda")
    assert all(torch.equal(x, again[name]) for name, x in got.items())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("how", ["contiguous", "zigzag", "striped", "greedy"])
def test_patterns(name, how):
    case = build(name, how, size=900, kv_heads=2, group=2, width=64, dtype=torch.bfloat16)
    assert worst(case, kernel(case, "cuda")) <= 1


def test_a_wrong_bit_is_seen():
    case = build(size=140, ranks=1, width=64, dtype=torch.bfloat16)
    assert worst(case, kernel(case, "cuda")) <= 1 and worst(case, kernel(flipped(case), "cuda")) > 2


@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_made_on_the_device(name):
    mask = pattern(name, 700, 1)
    rows, others = layout("striped", mask, 2).rows
    here, there = tiles(mask, rows, others), tiles(mask, rows, others, "cuda")
    assert (here.state == there.state).all() and torch.equal(here.words, there.words.cpu())
    for a, b in zip(here.transposed()[:4], there.transposed()[:4], strict=True):
        assert a is None or torch.equal(a, b.cpu())
    assert torch.equal(here.transposed().words, there.transposed().words.cpu())


def test_auto_takes_the_kernels_and_waits_for_nothing():
    mask = pattern("document_causal", 2000, 1)
    every = torch.arange(2000)
    seen = tiles(mask, every, every, "cuda")
    q, k, v, dout = (torch.randn(1, h, 2000, 128, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2, 4))

    def step(impl="auto"):
        out, lse = part.attend(q, k, v, seen, 0.1, None, impl)
        out, lse = part.attend(q, k, v, seen, 0.1, (out, lse), impl)
        return out, lse, *part.attend_back(q, k, v, seen, 0.1, lse, (out * dout).sum(3), dout, None, None, impl)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y, z in zip(got, step("triton"), step("torch"), strict=True):
        assert torch.equal(x, y) and tolerance.error(x, z) <= 2 * tolerance.HALF[torch.bfloat16]
    odd = torch.randn(1, 4, 2000, 300, device="cuda")
    assert part.attend(odd, odd, odd, seen, 0.1)[0].isfinite().all()  # which the kernels refuse: torch takes it


def test_offsets_past_31_bits():
    """Keys whose rows lie 2^20 numbers apart, so that the last ones are 2^32 bytes away."""
    length, step = 2400, 2**20
    room = torch.empty(length * step, device="cuda", dtype=torch.bfloat16)
    k = room.as_strided((1, 1, length, 64), (0, 0, step, 1)).normal_()
    q = torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    seen = TilePattern.of(torch.ones(length, length, dtype=torch.bool, device="cuda").tril())
    got = part.attend(q, k, k, seen, 0.1, None, "triton")
    want = part.attend(q, k.contiguous(), k.contiguous(), seen, 0.1, None, "triton")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*PATTERNS, "nothing"])
@pytest.mark.parametrize("width", [64, 128])
def test_kernels_for_hopper(name, dtype, width, monkeypatch):
    """Of the same tiles, on the GPU that they are written for; the same bits every time, or there is a race."""
    from manyheads.kernels import block_sparse_hopper

    if not block_sparse_hopper._device(torch.cuda.current_device())[0]:
        return  # nothing of its own runs here
    reached = []
    for part_ in ("add_forward", "add_backward"):
        taken = getattr(block_sparse_hopper, part_)
        monkeypatch.setattr(block_sparse_hopper, part_, lambda *a, n=part_, f=taken: (reached.append(n), f(*a))[1])
    given = {"mask": AttnMask((), 900)} if name == "nothing" else {"name": name}
    case = build(**given, how="zigzag", size=900, kv_heads=2, group=2, width=width, batch=2, dtype=dtype)
    got = kernel(case, "cuda")
    assert worst(case, got) <= 1
    assert name == "nothing" or set(reached) == {"add_forward", "add_backward"}
    for _ in range(5):
        assert all(torch.equal(x, got[part_]) for part_, x in kernel(case, "cuda").items())
    if name == "causal":
        wrong = build(size=140, ranks=1, width=width, dtype=dtype)
        assert worst(wrong, kernel(flipped(wrong), "cuda")) > 2
