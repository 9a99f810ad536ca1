# SPDX-License-Identifier: Apache-2.0
"""The kernels under Triton's interpreter, on the CPU. Collected in a process of its own by test_interpreter.py.

The interpreter computes bfloat16 wrongly, so float32 and float16 only.
"""

import functools
import math

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import tolerance
from kernels.cases import agrees, build, errors, mass_truth, poisoned
from manyheads import UserError
from manyheads.kernels.accumulated_attention import accumulated_attention, lse
from manyheads.kernels.decode import decode_attention
from tiers import spread

CODECS = ["plain", "int4", "k8v4", "fp8"]
HALVES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True, scope="session")
def _mended():
    """What the interpreter gets wrong of scalars, and a compiled kernel does not; and what it does over and over.

    NumPy 2.4 gives no Python number for an array of one element, which Triton 3.6 still asks for as a loop bound. A
    comparison is broadcast to a block of integers, in the dtype of what was compared: Triton 3.9 takes no such mask.

    Half of its time would go into looking for what is left to patch in the language whenever a kernel calls a
    function, though all is patched, and into new constants for the shape of each number. No result depends on either.
    """
    patch, patch_tensor, patched = interpreter._patch_lang, interpreter._patch_lang_tensor, set()

    def once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return interpreter._LangPatchScope()  # which has nothing to restore

    def mended(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def splat(self, kind, arg):
        return interpreter.TensorHandle(np.full(kind.shape, arg.data.flat[0]), arg.dtype.scalar)

    @functools.cache
    def shaped(sizes):
        return tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))

    def init(self, handle, kind):
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shaped(tuple(kind.shape) if kind.is_block() else ())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", once)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", mended)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", splat)
        monkeypatch.setattr(tl.tensor, "__init__", init)
        yield


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("codec", CODECS)
@spread("lengths", [[[0]], [[1]], [[63]], [[64]], [[65]], [[200]], [[0, 200], [65, 1], [64, 130]]], 3)
def test_ragged_lengths(codec, dtype, lengths):
    assert agrees(build(codec, dtype, lengths))


@spread("pairs", [1, 33, 5], 2)
def test_a_long_head_is_shared_by_more_programs(pairs):
    """Lengths as uneven as they can be: nearly all tokens are those of one head, and some have none."""
    assert agrees(build("int4", torch.float16, [[700 if i == pairs // 2 else i % 3 for i in range(pairs)]], dim=32))


@pytest.mark.parametrize("codec", CODECS)
@spread(("group", "dim"), [(1, 32), (2, 128), (3, 32), (4, 64), (8, 128), (20, 32)], 3)
def test_groups_and_dims(codec, group, dim):
    assert agrees(build(codec, torch.float16, [[70, 5]], group=group, dim=dim))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("codec", CODECS)
@spread("recent", [[0], [7], [12, 0]], 2)
def test_recent_tokens(codec, dtype, recent):
    assert agrees(build(codec, dtype, [[70, 0], [0, 130]], recent=recent))


@pytest.mark.parametrize("codec", CODECS)
def test_capacity_is_only_a_bound(codec):
    """Many more programs than there are blocks: most of them find nothing to do."""
    case = build(codec, torch.float32, [[0, 65]], capacity=5000)
    assert agrees(case)
    assert agrees(case.but(capacity=65))
    assert agrees(case.but(capacity=0))


@pytest.mark.parametrize("codec", CODECS)
def test_large_logits(codec):
    """Logits in the hundreds: the weights are one-hot, nothing overflows."""
    out, lse_ = errors(build(codec, torch.float32, [[130]], spread=200.0))
    assert out <= 1e-4 and lse_ <= 1e-6


def test_wrong_variants_fail():
    case = build("int4", torch.float32, [[70, 5]], recent=[7])
    given = case.given
    assert agrees(case)
    swapped = (given["k"] >> 4) | (given["k"] << 4)
    wrong = [
        {"k": swapped},
        {"v": (given["v"] >> 4) | (given["v"] << 4)},
        {"k_scale": given["v_scale"]},
        {"v_scale": given["k_scale"]},
        {"lengths": given["lengths"] - 1},
        {"lengths": given["lengths"] + 1},  # reads poison
        {"offsets": given["offsets"] - 1},
        {"recent_length": given["recent_length"] - 1},
        {"recent_k": None, "recent_v": None, "recent_length": None},
        {"scale": 1.0},
    ]
    for change in wrong:
        assert not agrees(case.but(**change)), change
    case.keys, case.values = ([row[::-1] for row in x] for x in (case.keys, case.values))
    assert not agrees(case)  # the heads the wrong way round


def test_wrong_variants_of_two_formats_fail():
    """Keys and values in formats of their own: the scales of each, and its pieces in their order."""
    case = build("k8v4", torch.float32, [[70, 5]], recent=[7], dim=32)
    given = case.given
    assert agrees(case)
    for change in (
        {"v": (given["v"] >> 4) | (given["v"] << 4)},
        {"k": given["k"].view(torch.uint8).unflatten(1, (-1, 2)).flip(-1).flatten(1).view(given["k"].dtype)},
        {"k_scale": given["v_scale"], "v_scale": given["k_scale"]},
        {"k_scale": (given["k_scale"].float() / 256).bfloat16()},
        {"v_scale": (given["v_scale"].float() / 256).bfloat16()},
    ):
        assert not agrees(case.but(**change)), change
    with pytest.raises(UserError, match="decode_attention"):
        decode_attention(case.q, **case.but(k=case.given["k"].float()).given)


def test_strangers_are_refused():
    case = build("fp8", torch.float32, [[5, 6]])
    given = case.given
    for change in (
        {"k_scale": None},
        {"lengths": given["lengths"].long()},
        {"offsets": given["offsets"][:, :1]},
        {"v": given["v"][:, :32]},
        {"k": given["k"].float()},
        {"recent_k": case.q},
    ):
        with pytest.raises(UserError, match="decode_attention"):
            decode_attention(case.q, **case.but(**change).given)
    with pytest.raises(UserError, match="32, 64, 128 or 256"):
        decode_attention(case.q[..., :48], **given)


@pytest.mark.parametrize("dtype", HALVES)
@spread(
    ("length", "size", "group", "dim"),
    [
        (1, 1, 1, 32),
        (1, 300, 4, 64),
        (5, 5, 2, 24),
        (64, 200, 2, 32),
        (130, 130, 1, 64),
        (40, 170, 3, 128),
        (3, 1, 2, 32),
    ],
    4,
)
def test_mass(dtype, length, size, group, dim):
    q = torch.randn(2, length, 2 * group, dim).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, size, dim).to(dtype)
    mass, sums = mass_truth(q, k, dim**-0.5)
    got = poisoned(accumulated_attention, q, k, scale=dim**-0.5)
    assert got.dtype == torch.float32
    limit = 1e-5  # float16 products are exact in float32
    assert tolerance.error(got, mass) <= limit
    assert tolerance.error(poisoned(lse, q, k, scale=dim**-0.5), sums) <= limit
    if length > 1 < size:
        for wrong in (mass_truth(q, k, 1.0), mass_truth(q.roll(1, 1), k, dim**-0.5), mass_truth(q, k, dim**-0.5, -1)):
            assert tolerance.error(got, wrong[0]) > 100 * limit


def test_mass_refuses():
    q, k = torch.randn(1, 4, 3, 32), torch.randn(1, 3, 3, 32)
    with pytest.raises(UserError, match="accumulated attention"):
        accumulated_attention(q, k, scale=1.0)
    with pytest.raises(UserError, match="accumulated attention"):
        lse(q, k[:, :2], scale=-1.0)
