# SPDX-License-Identifier: Apache-2.0
"""Attention over a window and over side keys, against the formula written pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import UserError, kernels
from manyheads.attention.local_global import block_sums, blocks_and_counts, local_global_attention
from tolerance import DEVICE, FORMULA, HALF, HALF_FACTOR, assert_close, error


def draw(length, size, window, heads=2, kv_heads=2, batch=2, width=8, seed=0, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    count = length // size

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v = normal(batch, heads, length, width), *(normal(batch, kv_heads, length, width) for _ in range(2))
    sides = [normal(batch, kv_heads, count, width) for _ in range(2)]
    biases = {"bias": normal(heads, 2 * window - 1), "side_bias": normal(heads, max(1, 2 * count - 1))}
    return (q, k, v, *sides), {"scale": width**-0.5, "window": window, "size": size, **biases}


def literal(q, k, v, side_k, side_v, *, scale, window, size, bias, side_bias, lengths=None):
    """One query at a time; rows behind the end are 0."""
    out = torch.zeros_like(q)
    groups, middle = q.shape[1] // k.shape[1], side_bias.shape[1] // 2
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        length = q.shape[2] if lengths is None else int(lengths[b])
        for t in range(length):
            near = [s for s in range(length) if abs(s - t) < window]
            count = length // size if side_k.shape[2] else 0
            block = min(t // size, count - 1)
            keys = torch.cat([k[b, h // groups, near], side_k[b, h // groups, :count]])
            values = torch.cat([v[b, h // groups, near], side_v[b, h // groups, :count]])
            biases = [bias[h, s - t + window - 1] for s in near]
            biases += [side_bias[h, g - block + middle] for g in range(count)]
            out[b, h, t] = (keys @ q[b, h, t] * scale + torch.stack(biases)).softmax(0) @ values
    return out


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40), size=st.integers(1, 12), window=st.integers(1, 14), kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 9), padded=st.booleans(),
)  # fmt: skip
def test_is_its_formula(length, size, window, kv_heads, seed, padded):
    call, given_ = draw(length, size, window, kv_heads=kv_heads, seed=seed)
    lengths = torch.tensor([length, max(1, length - 5)]) if padded else None
    want = literal(*call, **given_, lengths=lengths)
    got = local_global_attention(*call, **given_, lengths=lengths)
    assert got.isfinite().all()
    if lengths is not None:
        got = got.masked_fill((torch.arange(length) >= lengths[:, None])[:, None, :, None], 0.0)
    assert_close(got, want, FORMULA)


def test_controls():
    call, given_ = draw(40, 4, 6)
    want = literal(*call, **given_)
    assert error(local_global_attention(*call, **{**given_, "bias": given_["bias"].flip(1)}), want) > 1e-2
    assert error(local_global_attention(*call, **{**given_, "side_bias": given_["side_bias"].flip(1)}), want) > 1e-2
    none = [x[:, :, :0] for x in call[3:]]
    assert error(local_global_attention(*call[:3], *none, **{**given_, "side_bias": torch.zeros(2, 1)}), want) > 1e-2
    shorter = torch.tensor([40, 39])
    assert error(local_global_attention(*call, **given_, lengths=shorter)[1, :, :38], want[1, :, :38]) > 1e-4


@pytest.mark.parametrize("lengths", [None, [14, 9]])
def test_gradients(lengths):
    call, given_ = draw(14, 4, 3)
    inputs = [x.requires_grad_() for x in (*call, given_.pop("bias"), given_.pop("side_bias"))]
    ends = None if lengths is None else torch.tensor(lengths)

    def run(*x):
        out = local_global_attention(*x[:5], **given_, bias=x[5], side_bias=x[6], lengths=ends)
        return out if ends is None else out * (torch.arange(14) < ends[:, None])[:, None, :, None]

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("size", [4, 50])
def test_flexattention_is_the_same(size):
    call, given_ = draw(45, size, 6, kv_heads=1)
    flex = local_global_attention(*call, **given_, impl="flex")
    assert_close(flex, local_global_attention(*call, **given_), 1e-6)
    other = {**given_, "window": 7, "bias": torch.nn.functional.pad(given_["bias"], (1, 1))}  # control
    assert error(local_global_attention(*call, **other), flex) > 1e-3


def test_blocks_and_sums():
    blocks, counts = blocks_and_counts(torch.tensor([11, 8, 3]), 4, 11)
    assert counts.tolist() == [2, 2, 0]
    assert blocks.tolist() == [[0] * 4 + [1] * 7, [0] * 4 + [1] * 4 + [-1] * 3, [-1] * 11]
    x = torch.randn(3, 11, 5)
    sums = block_sums(x, blocks, 2)
    assert_close(sums[0], torch.stack([x[0, :4].sum(0), x[0, 4:].sum(0)]), 1e-6)
    assert_close(sums[1], torch.stack([x[1, :4].sum(0), x[1, 4:8].sum(0)]), 1e-6)
    assert not sums[2].any()


@pytest.mark.parametrize("length", [512, 2048])
def test_what_is_held_grows_with_the_length_times_window_and_summaries(length):
    """The largest tensor that a backward pass keeps: T (3 w + T / k) numbers a head, where full attention has T^2."""
    call, given_ = draw(length, 16, 32, batch=1, heads=1, kv_heads=1, dtype=torch.float32)
    held = []

    def pack(x):
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        local_global_attention(*(x.requires_grad_() for x in call), **given_)
    assert length * 3 * 32 < max(held) <= length * (3 * 32 + length // 16) < length**2 // 2


def test_errors():
    call, given_ = draw(20, 4, 3)
    for wrong in (
        {"bias": given_["bias"][:, 1:]},
        {"window": 0},
        {"size": 5},
        {"side_bias": given_["side_bias"][:, 2:]},
    ):
        with pytest.raises(UserError):
            local_global_attention(*call, **{**given_, **wrong})
    with pytest.raises(UserError, match="one length"):
        local_global_attention(*call, **given_, lengths=torch.tensor([20, 9]), impl="flex")


@pytest.mark.gpu
@pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "kv_heads"), [(4096, 2), (4000, 1)])
def test_on_a_gpu(length, kv_heads, dtype):
    """FlexAttention's compiled kernel, forward and all gradients, the tables of biases too, beside float64 in torch."""
    call, given_ = draw(length, 16, 128, kv_heads=kv_heads, width=64, device="cuda", dtype=dtype)
    grad = torch.randn(call[0].shape, device="cuda", dtype=torch.float64)

    def run(impl, kind):
        inputs = [x.detach().to(kind).requires_grad_() for x in (*call, given_["bias"], given_["side_bias"])]
        rest = {name: given_[name] for name in ("scale", "window", "size")}
        out = local_global_attention(*inputs[:5], **rest, bias=inputs[5], side_bias=inputs[6], impl=impl)
        out.backward(grad.to(kind))
        return [out, *(x.grad for x in inputs)]

    exact, plain, fast = run("torch", torch.float64), run("torch", dtype), run("auto", dtype)
    for want, mine, theirs in zip(exact, fast, plain, strict=True):
        least = DEVICE if dtype == torch.float32 else HALF[dtype]
        assert error(mine, want) <= max(least, HALF_FACTOR * error(theirs, want))


@pytest.mark.gpu
@pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_side_keys_and_gradients_on_a_gpu(dtype):
    """As an encoder with a window alone is judged: tiles that fit a forward with gradients need not fit this."""
    (q, k, v, *_), given_ = draw(512, 16, 32, heads=4, kv_heads=4, batch=16, width=64, device="cuda", dtype=dtype)
    sides, given_["side_bias"] = (k[:, :, :0], v[:, :, :0]), given_["side_bias"][:, :1]
    with torch.no_grad():
        rest = {name: given_[name] for name in ("scale", "window", "size")}
        biases = given_["bias"], given_["side_bias"]

        def attended(impl, kind):
            inputs = [x.to(kind) for x in (q, k, v, *sides, *biases)]
            return local_global_attention(*inputs[:5], **rest, bias=inputs[5], side_bias=inputs[6], impl=impl)

        exact, plain, fast = (
            attended(impl, kind)
            for impl, kind in (("torch", torch.float64), ("torch", dtype), ("flex", dtype))
        )  # fmt: skip
    least = DEVICE if dtype == torch.float32 else HALF[dtype]
    assert error(fast, exact) <= max(least, HALF_FACTOR * error(plain, exact))
