# SPDX-License-Identifier: Apache-2.0
"""The reference attention against torch's, by numbers, by gradients, and where torch's own conventions differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.attention import reference
from manyheads.attention.causal import for_gradient_of
from tolerance import FORMULA, HALF, HALF_FACTOR, assert_close, error, is_close, rounding, within

LENGTHS = st.sampled_from([1, 2, 7, 8, 63, 64, 65])


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sdpa(q, k, v, **kwargs):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **kwargs).transpose(1, 2)


@given(
    batch=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), kv=st.integers(1, 3), queries=LENGTHS, keys=LENGTHS,
    dim=st.sampled_from([1, 5, 8]), density=st.sampled_from([0.0, 0.3, 0.9, 1.0]), causal=st.booleans(),
    biased=st.booleans(), strided=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_against_sdpa(batch, groups, kv, queries, keys, dim, density, causal, biased, strided, seed):
    """Every shape, mask (rows without a key among them) and memory layout, in float64."""
    heads = groups * kv
    q, k, v = (
        draw((batch, heads, queries, dim), seed),
        draw((batch, kv, keys, dim), seed + 1),
        draw((batch, kv, keys, 3), seed + 2),
    )
    if strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    mask = draw((batch, heads, queries, keys), seed + 3).sigmoid() < density
    bias = draw((batch, heads, queries, keys), seed + 4) if biased else None
    got = reference.attention(q, k, v, scale=0.7, mask=mask, bias=bias, is_causal=causal)
    both = mask & reference.causal_mask(queries, keys) if causal else mask
    additive = torch.where(both, 0.0, -torch.inf).double() + (0 if bias is None else bias)
    assert error(got, sdpa(q, k, v, attn_mask=additive, scale=0.7)) <= FORMULA
    empty = ~both.any(-1).transpose(1, 2)
    assert bool((got[empty] == 0).all())


@given(window=st.integers(1, 6), queries=st.integers(1, 9), extra=st.integers(0, 9))
def test_causal_is_anchored_at_the_last_key(window, queries, extra):
    """Query t sees S - T + t + 1 keys; torch's ``is_causal`` starts at the first key instead (D13)."""
    keys = queries + extra
    mask = reference.causal_mask(queries, keys)
    assert mask.sum(1).tolist() == [extra + t + 1 for t in range(queries)]
    q, k = draw((1, 1, queries, 4), 0), draw((1, 1, keys, 4), 1)
    if extra:
        theirs = sdpa(q, k, k, is_causal=True)
        assert error(reference.attention(q, k, k, scale=0.5, is_causal=True), theirs) > 1e-3


def test_against_loops():
    """Softcap, sinks, bias and grouped heads, written as sums over single numbers."""
    q, k, v = draw((2, 4, 3, 5), 0), draw((2, 2, 6, 5), 1), draw((2, 2, 6, 4), 2)
    bias, sinks, mask = draw((2, 4, 3, 6), 3), draw((4,), 4), draw((2, 1, 3, 6), 5) > 0
    got = reference.attention(q, k, v, scale=0.3, mask=mask, bias=bias, softcap=2.0, sinks=sinks)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3)).tolist():
        weights = [
            float(torch.exp(2.0 * torch.tanh(0.3 * (q[b, h, t] @ k[b, h // 2, s]) / 2.0) + bias[b, h, t, s]))
            * bool(mask[b, 0, t, s])
            for s in range(6)
        ]
        total = sum(weights) + float(sinks[h].exp())
        want = sum(w / total * v[b, h // 2, s] for s, w in enumerate(weights))
        assert is_close(got[b, t, h], want)


def test_empty_rows_give_zero_and_zero_gradient():
    """Where a softmax by hand gives NaN forward and NaN in the gradient of v (D12)."""
    q, k, v = (draw((1, 2, 3, 4), i).requires_grad_(True) for i in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool).tril(-1)  # the first row sees nothing
    out = reference.attention(q, k, v, scale=1.0, mask=mask)
    assert bool((out[:, 0] == 0).all())
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[0][:, :, 0] == 0).all()) and bool((grads[2][:, :, 2] == 0).all())
    naive = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert bool(naive[:, :, 0].isnan().all()) and bool(torch.autograd.grad(naive[:, :, 1:].sum(), v)[0].isnan().any())


@pytest.mark.parametrize("case", ["plain", "causal", "masked", "bias", "softcap", "sinks"])
def test_gradients(case):
    q, k, v = (draw((1, 4 if i == 0 else 2, 3 if i == 0 else 5, 3), i).requires_grad_(True) for i in range(3))
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "masked": {"mask": draw((1, 4, 3, 5), 7) > 0.5},
        "bias": {"bias": draw((1, 4, 3, 5), 8).requires_grad_(True)},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": draw((4,), 9).requires_grad_(True)},
    }[case]
    names = [n for n, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    fixed = {n: x for n, x in options.items() if n not in names}

    def function(q, k, v, *rest):
        return reference.attention(q, k, v, scale=0.6, **fixed, **dict(zip(names, rest, strict=True)))

    assert torch.autograd.gradcheck(function, (q, k, v, *(options[n] for n in names)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_lower_precision(dtype, length):
    """At most twice as far from float64 as the same sums of plain torch in that dtype."""
    q, k, v = (draw((2, 4 if i == 0 else 2, length, 16), i, dtype) for i in range(3))
    true = sdpa(*(x.double() for x in (q, k, v)), is_causal=True)
    got = error(reference.attention(q, k, v, scale=0.25, is_causal=True), true)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    plain = ((q @ k.transpose(-1, -2) * 0.25).masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    assert got <= HALF_FACTOR * error(plain, true) + rounding(torch.float32, 1)
    assert got <= HALF[dtype]


@given(
    queries=LENGTHS, keys=LENGTHS, density=st.sampled_from([0.0, 0.5, 1.0]), sunk=st.booleans(), seed=st.integers(0, 5)
)
def test_lse(queries, keys, density, sunk, seed):
    """log of the sum, -inf where there is nothing to sum; weights made with it are those of the softmax."""
    x, sinks = draw((2, 3, queries, keys), seed), draw((3,), seed + 1) if sunk else None
    mask = draw((2, 1, queries, keys), seed + 2).sigmoid() < density
    got = reference.logsumexp(x, mask, sinks)
    want = (x.exp() * mask).sum(-1) + (0 if sinks is None else sinks.exp()[:, None])
    assert_close(got, want.log(), FORMULA)
    weights = torch.where(mask & got.isfinite()[..., None], (x - got[..., None]).exp(), 0.0)
    assert_close(weights, reference.softmax(x, mask, sinks), FORMULA)


@given(shift=st.sampled_from([-1e4, 0.0, 700.0, 1e4]), seed=st.integers(0, 5))
def test_softmax_does_not_overflow(shift, seed):
    x = draw((1, 2, 3, 7), seed)
    moved = within(torch.float64, 1) * abs(shift)  # `x + shift` is rounded
    assert_close(reference.softmax(x + shift), x.softmax(-1), moved + FORMULA)


def test_query_groups_are_interleaved():
    """Query heads 0..G-1 share key head 0: tiling instead of interleaving is the usual mistake."""
    k = torch.arange(2.0)[None, :, None, None]
    assert reference.repeat_kv(k, 6)[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_only_a_bias_that_asks_makes_queries_ask():
    q, bias = torch.randn(1, 2, 3, 4), torch.zeros(3, 3)
    assert for_gradient_of(bias, q, q, q) is q and for_gradient_of(None, q, q, q) is q
    bias.requires_grad_()
    assert for_gradient_of(bias, q, q, q).requires_grad and not q.requires_grad
    asked = q.clone().requires_grad_()
    assert for_gradient_of(bias, asked, q, q) is asked and for_gradient_of(bias, q, q, asked) is q
