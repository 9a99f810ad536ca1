# SPDX-License-Identifier: Apache-2.0
"""One pattern, three lowerings: dense from its rules, in bands, and as FlexAttention's mask (eager, on the CPU)."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.attention import masks
from manyheads.attention.masks import MaskSpec, banded, masked_attention, padded, zero_padding
from manyheads.attention.reference import attention
from manyheads.errors import UserError
from tolerance import FORMULA, assert_close, error

SCALE = 0.4
T = 37


def qkv(num_queries=T, num_keys=T, batch=2, heads=4, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, num_queries, 8), (batch, kv_heads, num_keys, 8), (batch, kv_heads, num_keys, 6))
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def documents(batch=2, length=T):
    return torch.stack([torch.arange(length) // (5 + 4 * b) for b in range(batch)])


def blocks(batch=1, heads=1, rows=5, columns=5):
    allowed = torch.rand(batch, heads, rows, columns, generator=torch.Generator().manual_seed(3)) < 0.6
    return allowed | torch.eye(rows, columns, dtype=torch.bool)


SPECS = {
    "causal": MaskSpec(),
    "everything": MaskSpec(causal=False),
    "window": MaskSpec(window=5),
    "window of 1": MaskSpec(window=1),
    "window on both sides": MaskSpec(causal=False, window=4),
    "window longer than all": MaskSpec(window=100),
    "chunk": MaskSpec(chunk=8),
    "chunk, both sides": MaskSpec(causal=False, chunk=8),
    "window in a chunk": MaskSpec(chunk=8, window=3),
    "prefix": MaskSpec(window=3, prefix=4),
    "documents": MaskSpec(documents=documents()),
    "documents of all rows": MaskSpec(documents=documents(1), window=4),
    "blocks": MaskSpec(blocks=blocks(), block=8),
    "blocks by row and head": MaskSpec(blocks=blocks(2, 4), block=8),
    "blocks, both sides": MaskSpec(causal=False, blocks=blocks(), block=8),
}


def said(spec, num_queries=T, num_keys=T, batch=2, heads=4):
    """The rules of ``spec`` pair by pair, as its docstring has them."""
    mask = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.bool)
    for b, h, t, s in itertools.product(range(batch), range(heads), range(num_queries), range(num_keys)):
        at = t + num_keys - num_queries
        far = at - s if spec.causal else abs(at - s)
        seen = not (spec.causal and s > at) and (spec.window is None or far < spec.window)
        seen = (seen and (spec.chunk is None or at // spec.chunk == s // spec.chunk)) or s < spec.prefix
        if spec.documents is not None:
            row = spec.documents[b % len(spec.documents)]
            seen = seen and bool(row[at] == row[s])
        if spec.blocks is not None:
            which = spec.blocks[b % spec.blocks.shape[0], h % spec.blocks.shape[1]]
            seen = seen and bool(which[t // spec.block, s // spec.block])
        mask[b, h, t, s] = seen
    return mask


@pytest.mark.parametrize("name", SPECS)
def test_dense_is_what_the_rules_say(name):
    spec = SPECS[name]
    for num_queries in (T, 9, 1):
        got = spec.dense(num_queries, T).expand(2, 4, -1, -1)
        assert torch.equal(got, said(spec, num_queries))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_queries", [T, 9])
def test_all_lowerings_agree(name, num_queries):
    spec = SPECS[name]
    q, k, v = qkv(num_queries)
    want = attention(q, k, v, scale=SCALE, mask=said(spec, num_queries)).transpose(1, 2)
    for impl in ("auto", "dense", "flex"):
        assert_close(masked_attention(q, k, v, spec, scale=SCALE, impl=impl), want, FORMULA)


@given(st.integers(1, 40), st.integers(1, 45), st.booleans())
def test_bands_of_any_size(length, window, causal):
    q, k, v = qkv(length, length)
    spec = MaskSpec(causal=causal, window=window)
    want = masked_attention(q, k, v, spec, scale=SCALE, impl="dense")
    assert_close(banded(q, k, v, window, scale=SCALE, causal=causal), want, FORMULA)
    assert_close(masked_attention(q, k, v, spec, scale=SCALE, impl="banded"), want, FORMULA)
    assert_close(masked_attention(q, k, v, spec, scale=SCALE), want, FORMULA)


def test_control_a_window_off_by_one():
    q, k, v = qkv()
    want = masked_attention(q, k, v, MaskSpec(window=5), scale=SCALE)
    for other in (4, 6):
        assert error(masked_attention(q, k, v, MaskSpec(window=other), scale=SCALE), want) > 1e-2
        assert error(banded(q, k, v, other, scale=SCALE), want) > 1e-2


def test_gradients_of_bands():
    q, k, v = (x.requires_grad_() for x in qkv(11, 11, batch=1, heads=2, kv_heads=1))
    assert torch.autograd.gradcheck(lambda *x: banded(*x, 3, scale=SCALE), (q, k, v))


def test_bands_hold_no_square(monkeypatch):
    """The window is taken in bands on its own accord, and its scores grow with the length, not with its square."""
    sizes = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, attn_mask=None, **more):
        sizes.append(q.shape[:-1].numel() * k.shape[-2])
        return sdpa(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(masks.torch.nn.functional, "scaled_dot_product_attention", counted)
    for length in (256, 512):
        masked_attention(*qkv(length, length), MaskSpec(window=16), scale=SCALE)
    assert sizes == [2 * 4 * length * 2 * 16 for length in (256, 512)]


def test_rows_that_see_nothing_give_zero_and_no_gradient():
    none = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    none[0, 0, 1:] = True
    spec = MaskSpec(blocks=none, block=8)
    q, k, v = (x.requires_grad_() for x in qkv())
    out = masked_attention(q, k, v, spec, scale=SCALE)
    assert not out[:, :, :8].any() and out[:, :, 8:].any()
    out.sum().backward()
    assert not q.grad[:, :, :8].any() and all(x.grad.isfinite().all() for x in (q, k, v))
    flex = masked_attention(q.detach(), k.detach(), v.detach(), spec, scale=SCALE, impl="flex")
    assert_close(flex, out.detach(), FORMULA)
    hidden = masked_attention(q, k, v, MaskSpec(), scale=SCALE, real=torch.zeros(2, T, dtype=torch.bool))
    assert not hidden.any()


def test_positions_and_padding():
    """Keys at positions of their own: as the same keys in order; padding is not seen, NaN or not."""
    q, k, v = qkv()
    order = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(b)) for b in range(2)])
    for spec in (MaskSpec(), MaskSpec(window=5), MaskSpec(chunk=8), MaskSpec(window=3, prefix=2)):
        want = masked_attention(q, k, v, spec, scale=SCALE)
        mixed = [x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)]
        at = torch.arange(T).expand(2, -1)
        got = masked_attention(q, *mixed, spec, scale=SCALE, positions=(at, order))
        assert_close(got, want, FORMULA)
    real = torch.arange(T) < T - 3
    short = masked_attention(q[:, :, :-3], k[:, :, :-3], v[:, :, :-3], MaskSpec(causal=False), scale=SCALE)
    got = masked_attention(q, k, v, MaskSpec(causal=False), scale=SCALE, real=real.expand(2, -1))
    assert_close(got[:, :, :-3], short, FORMULA)


def test_bias_is_added():
    q, k, v = qkv()
    bias = torch.randn(2, 4, T, T, dtype=torch.float64)
    want = attention(q, k, v, scale=SCALE, mask=said(MaskSpec(window=5)), bias=bias).transpose(1, 2)
    assert_close(masked_attention(q, k, v, MaskSpec(window=5), scale=SCALE, bias=bias), want, FORMULA)


def test_refusals():
    q, k, v = qkv()
    with pytest.raises(UserError, match="banded"):
        masked_attention(q, k, v, MaskSpec(chunk=4), scale=SCALE, impl="banded")
    with pytest.raises(UserError, match="flex"):
        masked_attention(q, k, v, MaskSpec(), scale=SCALE, impl="flex", real=torch.ones(2, T, dtype=torch.bool))
    for name in ("window", "chunk"):
        with pytest.raises(UserError, match=name):
            MaskSpec(**{name: 0})


def test_plain():
    assert MaskSpec().plain and MaskSpec(block=8).plain
    assert not any(spec.plain for name, spec in SPECS.items() if name != "causal")


def test_hide():
    x = torch.full((2, 3, 4), torch.nan)
    x[0, 0] = 1.0
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 0] = True
    assert torch.equal(zero_padding(x, mask), x.nan_to_num(0.0)) and zero_padding(x, None) is x


def test_rows_are_filled_up():
    rows = [torch.arange(1, n + 1) for n in (2, 0, 3)]
    x, there = padded(rows, -1)
    assert x.tolist() == [[1, 2, -1], [-1, -1, -1], [1, 2, 3]] and there.tolist() == (x > 0).tolist()
    frames, _ = padded([torch.ones(n, 4) for n in (2, 3)])
    assert frames.shape == (2, 3, 4) and frames[0, 2].eq(0).all() and frames.sum() == 5 * 4
