# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in torch: against the formula, by gradcheck, in parts that are merged, and its other ways."""

import logging
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tolerance
from kernels.sparse_cases import build, errors, worst, wrong_variants
from manyheads import UserError
from manyheads.attention import patterns, reference, sparse, sparse_twin
from manyheads.attention.block_pattern import BlockPattern, Rule
from manyheads.attention.sparse import Call, block_sparse_attention, choose, merge

LENGTHS = st.sampled_from([1, 2, 7, 16, 33])
SIZES = st.sampled_from([1, 3, 4, 16])


def draw(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    batch=st.integers(1, 2), groups=st.sampled_from([1, 2]), kv=st.integers(1, 2), length=LENGTHS, size=LENGTHS,
    block_q=SIZES, block_k=SIZES, density=st.sampled_from([0.0, 0.3, 0.9]), causal=st.booleans(),
    window=st.sampled_from([None, 1, 5]), shared=st.booleans(), padded=st.booleans(), biased=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_formula(
    batch, groups, kv, length, size, block_q, block_k, density, causal, window, shared, padded, biased, seed
):
    """Every shape, rule and list (rows without a key among them), output, log-sum-exp and gradients, in float64."""
    torch.manual_seed(seed)
    case = build(
        length=length, size=size, batch=batch, heads=groups * kv, kv_heads=kv, width=5, columns=3, block_q=block_q,
        block_k=block_k, density=density, shared=shared, padded=padded, biased=biased, causal=causal, window=window,
    )  # fmt: skip
    got = case.run("torch", dtype=torch.float64)
    assert max(errors(case, got).values()) <= tolerance.DEEP


@pytest.mark.parametrize("given", [{"window": 11}, {"packed": [0, 20, 20, 48]}, {"padded": True, "biased": True}])
def test_wrong_variants_fail(given):
    case = build(length=48, **given)
    got = case.run("torch")
    assert worst(case, got) <= 1
    for name, wrong in wrong_variants(case).items():
        assert worst(wrong, got) > 100, name


def test_little_memory_gives_the_same(monkeypatch):
    """One block of queries at a time, longest lists first."""
    case = build(length=70, size=90, batch=2, heads=4, kv_heads=2)
    want = case.run("torch")
    monkeypatch.setattr(sparse_twin, "block_size", lambda x, per_row: 1)
    for name, x in case.run("torch").items():
        tolerance.assert_close(x, want[name], 1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    q, k, v = draw((1, 4, 7, 3), 0), draw((1, 2, 9, 3), 1), draw((1, 2, 9, 2), 2)
    blocks = torch.tensor([[[True, False, True, True, True], [True, True, False, True, False]]])[:, None]
    pattern = BlockPattern.from_blocks(blocks, 7, 9, block_q=4, block_k=2)

    def call(*leaves):
        return block_sparse_attention(*leaves, pattern, scale=0.6, causal=causal, lse=True)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, k, v)])


def test_parts_merge_to_the_whole():
    """A pattern and what it leaves out, with gradients of both; and what merging without lse would give."""
    q, k, v = (draw((2, h, 40, 8), h).requires_grad_() for h in (4, 2, 2))
    pattern = BlockPattern.from_blocks(torch.rand(2, 4, 5, 10) < 0.4, 40, 40, block_q=8, block_k=4)
    parts = [block_sparse_attention(q, k, v, p, scale=0.5, lse=True) for p in (pattern, ~pattern)]
    out, lse = merge(*zip(*parts, strict=True))
    want = reference.attention(q, k, v, scale=0.5, is_causal=True).transpose(1, 2)
    sums = reference.logsumexp(reference.logits(q, k, scale=0.5), reference.causal_mask(40, 40))
    tolerance.assert_close(out.detach(), want.detach(), tolerance.DEEP)
    tolerance.assert_close(lse.detach(), sums.detach(), tolerance.DEEP)
    weight = torch.randn_like(out)
    for got, right in zip(
        torch.autograd.grad((out * weight).sum() + lse.sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((want * weight).sum() + sums.sum(), (q, k, v)), strict=True,
    ):  # fmt: skip
        tolerance.assert_close(got, right, tolerance.DEEP)
    flat, _ = merge([x[0] for x in parts], [torch.zeros_like(lse)] * 2)
    assert tolerance.error(flat.detach(), want.detach()) > 0.1
    detached, _ = merge([x[0] for x in parts], [x[1].detach() for x in parts])
    (lost,) = torch.autograd.grad((detached * weight).sum(), q, retain_graph=True)
    (held,) = torch.autograd.grad((out * weight).sum(), q)
    assert tolerance.error(lost, held) > 0.01


def test_merging_nothing():
    """Rows of which no part sees a key: 0 and -inf, and gradients are numbers."""
    outs = [torch.zeros(1, 1, 2, 3, requires_grad=True) for _ in "ab"]
    lses = [torch.tensor([[[-torch.inf, 1.0]]], requires_grad=True) for _ in "ab"]
    out, lse = merge(outs, lses)
    assert lse[0, 0, 0] == -torch.inf and out[0, 0, 0].eq(0).all()
    tolerance.assert_close(lse[0, 0, 1].detach(), torch.tensor(1.0).exp().mul(2).log())
    for grad in torch.autograd.grad(out.sum() + lse[0, 0, 1], [*outs, *lses]):
        assert grad.isfinite().all()


def test_pooled_keys_count_by_their_number():
    """A key and value that stand for n equal ones: a bias of log n, or log n on the log-sum-exp that is merged."""
    q, k, v = draw((1, 2, 6, 4), 0), draw((1, 2, 8, 4), 1), draw((1, 2, 8, 4), 2)
    k, v = (torch.cat([x[:, :, :4], x[:, :, 4:5].expand(-1, -1, 4, -1)], 2) for x in (k, v))
    full = patterns.dense(6, 8, rule=Rule(False))
    want = block_sparse_attention(q, k, v, full, scale=1.0, causal=False)
    few = patterns.dense(6, 5, rule=Rule(False))
    call = {"scale": 1.0, "causal": False}
    bias = torch.tensor([1.0, 1, 1, 1, 4]).log()[None, None]
    cut = q, k[:, :, :5], v[:, :, :5], few
    tolerance.assert_close(block_sparse_attention(*cut, **call, key_bias=bias), want, 1e-7)
    assert tolerance.error(block_sparse_attention(*cut, **call, key_bias=bias * 1.1), want) > 1e-3
    assert tolerance.error(block_sparse_attention(*cut, **call), want) > 1e-3
    near = patterns.dense(6, 4, rule=Rule(False))
    one = patterns.dense(6, 1, rule=Rule(False))
    a = block_sparse_attention(q, k[:, :, :4], v[:, :, :4], near, scale=1.0, causal=False, lse=True)
    b = block_sparse_attention(q, k[:, :, 4:5], v[:, :, 4:5], one, scale=1.0, causal=False, lse=True)
    tolerance.assert_close(merge([a[0], b[0]], [a[1], b[1] + torch.tensor(4.0).log()])[0], want, 1e-7)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("impl", ["flex", "masked", "flash"])
def test_other_ways(impl, window):
    """FlexAttention, dense attention with a mask, and flash where nothing is left out."""
    q, k, v = draw((2, 4, 200, 16), 0).float(), draw((2, 2, 260, 16), 1).float(), draw((2, 2, 260, 16), 2).float()
    blocks = torch.rand(1, 4, 2, 3) < 0.6
    blocks[0, 0, 0] = False
    pattern = BlockPattern.from_blocks(blocks, 200, 260)
    small = patterns.a_shape(200, 260, 3, 50, block_q=16, block_k=8)
    for each in (pattern, small) if impl != "flash" else (patterns.dense(200, 260),):
        call = {"scale": 0.3, "window": window}
        if impl == "flash" and window:
            with pytest.raises(UserError, match="window"):
                block_sparse_attention(q, k, v, each, **call, impl=impl)
            continue
        want = block_sparse_attention(q, k, v, each, **call, impl="torch")
        got = block_sparse_attention(q, k, v, each, **call, impl=impl)
        tolerance.assert_close(got, want, tolerance.SAME)
        assert tolerance.error(block_sparse_attention(q, k, v, each, scale=0.3, window=29, impl="torch"), want) > 1e-3


def test_flex_has_documents_and_bias():
    case = build(length=150, packed=[0, 40, 150], block_q=32, block_k=64, biased=True)
    pattern, q, k, v = case.pattern(), case.q, case.k, case.v
    call = {"scale": 0.3, "cu_seqlens": case.cu_seqlens, "key_bias": case.bias, "lse": True}
    want = block_sparse_attention(q, k, v, pattern, **call)
    got = block_sparse_attention(q, k, v, pattern, **call, impl="flex")
    for a, b in zip(got, want, strict=True):
        tolerance.assert_close(a, b, tolerance.SAME)


def test_the_way_is_told(caplog, monkeypatch):
    q = torch.randn(1, 1, 4, 8)
    chosen = choose(q, q, q, Call(patterns.dense(4, 4), Rule(), 1.0))
    assert chosen.impl == "torch" and "GPU" in chosen.reason
    sparse._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger=sparse.__name__):
        sparse._tell(chosen)
        sparse._tell(chosen)
    assert [x.message for x in caplog.records] == ["block-sparse attention runs as torch: there is no GPU with Triton"]


def test_strangers_are_refused():
    q, k = torch.randn(1, 4, 8, 4), torch.randn(1, 2, 8, 4)
    pattern = patterns.dense(8, 8)
    wrong = [
        ({"k": torch.randn(1, 3, 8, 4)}, "belong together"),
        ({"pattern": patterns.dense(8, 9)}, "a pattern of 8 queries and 9 keys"),
        ({"pattern": BlockPattern.from_blocks(torch.ones(1, 2, 1, 1, dtype=torch.bool), 8, 8)}, "B = 1 and H = 4"),
        ({"key_bias": torch.zeros(1, 3, 8)}, "key_bias"),
        ({"key_bias": torch.zeros(1, 1, 8, requires_grad=True)}, "without a gradient"),
        ({"valid": torch.ones(1, 7, dtype=torch.bool)}, "valid"),
        ({"cu_seqlens": torch.tensor([0, 8]), "q": torch.randn(1, 4, 7, 4)}, "packed"),
        ({"scale": 0.0}, "scale"),
        ({"window": 0}, "window"),
        ({"impl": "masked", "lse": True}, "log-sum-exp"),
        ({"impl": "flash", "lse": True}, "log-sum-exp"),
    ]
    for change, message in wrong:
        given = {"q": q, "k": k, "v": change.get("k", k), "pattern": pattern, "scale": 1.0, **change}
        with pytest.raises(UserError, match=message):
            block_sparse_attention(**given)


def test_the_documented_example():
    page = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text(encoding="utf-8")
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "block_sparse_attention" in x]
    exec(code, {})
