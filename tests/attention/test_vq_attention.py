# SPDX-License-Identifier: Apache-2.0
"""Attention over codewords against dense softmax over quantised keys, and codebooks against their clusters."""

import pytest
import torch

from manyheads.attention import product_codes
from manyheads.attention.vq_attention import bias_size, codewords, follow, quantize, vq_attention
from tolerance import CLOSE, FORMULA, assert_close, error, is_far, within

H, DK, DV = 2, 3, 5


def drawn(length, codes, rows=2, dtype=torch.float64):
    q, k = (torch.randn(rows, H, length, DK, dtype=dtype) for _ in range(2))
    v, codebook = torch.randn(rows, H, length, DV, dtype=dtype), torch.randn(H, codes, DK, dtype=dtype)
    return q, k, v, codebook


def dense(q, k, v, block, causal=True, bias=None, far=True, scale=1.0):
    """Softmax over all keys; ``bias`` by distance and only where blocks are the same or beside each other."""
    at = torch.arange(q.shape[-2])
    apart, blocks = at[:, None] - at, (at // block)[:, None] - at // block if block else at[:, None] * 0 + 9
    near = blocks.abs() <= 1
    x = scale * q @ k.mT
    if bias is not None:
        x = x + torch.where(near, bias[(apart if causal else apart + 2 * block - 1).clamp(0, len(bias) - 1)], 0.0)
    seen = (near if not far else torch.ones_like(near)) & ((apart >= 0) | (not causal))
    return x.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("impl", ["blocks", "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "block"), [(1, 4), (4, 4), (9, 4), (23, 4), (24, 1), (40, 7), (17, 64)])
def test_is_dense_attention_on_quantised_keys(length, block, causal, impl):
    q, k, v, codebook = drawn(length, 6)
    codes, nearest = quantize(k, codebook)
    bias = torch.randn(bias_size(block, causal), dtype=torch.float64)
    given = {"block": block, "causal": causal, "bias": bias, "scale": 0.7, "impl": impl}
    out, _ = vq_attention(q, nearest, v, codes, codebook, **given)
    assert_close(out, dense(q, nearest, v, block, causal, bias, scale=0.7), FORMULA)
    near, _ = vq_attention(q, nearest, v, **given)
    assert_close(near, dense(q, nearest, v, block, causal, bias, far=False, scale=0.7), FORMULA)
    if length > 1:  # control: keys as they were
        assert is_far(out, dense(q, k, v, block, causal, bias, scale=0.7), FORMULA)
    if length > 3 * block:  # control: nothing far
        assert is_far(out, near, FORMULA)


def test_all_by_codeword():
    q, k, v, codebook = drawn(30, 6)
    codes, nearest = quantize(k, codebook)
    out, state = vq_attention(q, nearest, v, codes, codebook, block=0, causal=False)
    assert state is None
    assert_close(out, dense(q, nearest, v, 0, causal=False), FORMULA)
    table = q @ codebook.mT  # controls: without the log of counts; and sums for means
    counts = torch.nn.functional.one_hot(codes, 6).double().sum(2)
    sums = torch.nn.functional.one_hot(codes, 6).double().mT @ v
    means = sums / counts.clamp(min=1)[..., None]
    held = (counts > 0)[:, :, None]
    biased = (table + counts.clamp(min=1).log()[:, :, None]).masked_fill(~held, -torch.inf).softmax(-1)
    assert_close(biased @ means, out, FORMULA)
    assert is_far(table.masked_fill(~held, -torch.inf).softmax(-1) @ means, out, FORMULA)
    assert is_far(biased @ sums, out, FORMULA)


def test_a_codeword_for_every_key_is_softmax():
    q, _, v, codebook = drawn(50, 8)
    k = codebook[None, :, torch.arange(50) % 8].expand(2, -1, -1, -1)
    codes, nearest = quantize(k, codebook)
    out, _ = vq_attention(q, nearest, v, codes, codebook, block=4)
    assert_close(out, dense(q, k, v, 4), FORMULA)
    codes, nearest = quantize(k, codebook[:, :7])  # control: one is missing
    assert error(vq_attention(q, nearest, v, codes, codebook[:, :7], block=4)[0], dense(q, k, v, 4)) > 1e-3


def test_one_codeword_is_the_mean_of_what_is_far_beside_what_is_near():
    q, k, v, codebook = drawn(20, 1)
    codes, nearest = quantize(k, codebook)
    out, _ = vq_attention(q, nearest, v, codes, codebook, block=4)
    score = (q @ codebook[:, :1].mT)[..., 0].exp()  # the same for near keys: all are this codeword
    want = torch.stack([v[:, :, : t + 1].mean(2) for t in range(20)], 2)
    assert_close(out, want, FORMULA)
    near, _ = vq_attention(q, k, v, block=4)  # what is near exactly, what is far by its mean
    both, _ = vq_attention(q, k, v, codes, codebook, block=4)
    t, far = 19, 12  # blocks of 4: 12 tokens are farther than the block before
    below = (q[:, :, t, None] @ k[:, :, far:].mT).exp().sum(-1)
    mixed = (below * near[:, :, t] + far * score[:, :, t, None] * v[:, :, :far].mean(2)) / (
        below + far * score[:, :, t, None]
    )
    assert_close(both[:, :, t], mixed, FORMULA)
    assert is_far(both[:, :, t], near[:, :, t], FORMULA)


@pytest.mark.parametrize("cuts", [(5, 6, 7, 30, 31), (16,), tuple(range(1, 40))])
def test_state_goes_on_and_counts_what_was_seen(cuts):
    q, k, v, codebook = drawn(40, 6)
    codes, nearest = quantize(k, codebook)
    bias = torch.randn(8, dtype=torch.float64)
    want, whole = vq_attention(q, nearest, v, codes, codebook, block=4, bias=bias, impl="blocks")
    _, same = vq_attention(q, nearest, v, codes, codebook, block=4, bias=bias, impl="dense")
    for name in ("k", "v", "codes", "counts", "sums", "seen"):
        assert_close(getattr(same, name), getattr(whole, name), FORMULA)
    state, outs = None, []
    for a, b in zip((0, *cuts), (*cuts, 40), strict=True):
        parts = (x[:, :, a:b] for x in (q, nearest, v, codes))
        out, state = vq_attention(*parts, codebook, block=4, bias=bias, state=state, impl="blocks")
        outs.append(out)
        far = max(0, b // 4 - 1) * 4  # all but the block that is begun and the one before
        assert state.counts.sum(-1).eq(far).all() and state.seen.eq(b).all()
        sums = torch.nn.functional.one_hot(codes[:, :, :far], 6).double().mT @ v[:, :, :far]
        assert far == 0 or error(state.sums, sums) < FORMULA
    assert_close(torch.cat(outs, 2), want, FORMULA)
    assert state.nbytes == whole.nbytes and torch.equal(state.counts, whole.counts)
    lost, _ = vq_attention(*(x[:, :, 20:] for x in (q, nearest, v, codes)), codebook, block=4, bias=bias)
    assert is_far(lost, want[:, :, 20:], FORMULA)  # control: without the state


def test_texts_of_several_lengths():
    q, k, v, codebook = drawn(33, 6, rows=4)
    codes, nearest = quantize(k, codebook)
    lengths = torch.tensor([33, 20, 1, 0])
    for causal, impl in ((True, "blocks"), (False, "blocks"), (True, "dense"), (False, "dense")):
        out, state = vq_attention(q, nearest, v, codes, codebook, block=4, causal=causal, lengths=lengths, impl=impl)
        for i, n in enumerate(lengths.tolist()):
            want = dense(q[i, :, :n], nearest[i, :, :n], v[i, :, :n], 4, causal) if n else v[i, :, :0]
            assert_close(out[i, :, :n], want, FORMULA)
        assert out.isfinite().all() and (state is None or torch.equal(state.seen, lengths))


def test_unused_codewords_are_nothing_and_never_nan():
    q, k, v, codebook = drawn(30, 6)
    far = torch.cat([codebook, torch.full((H, 3, DK), 50.0, dtype=torch.float64)], 1)  # scores in the hundreds
    codes, nearest = quantize(k, codebook)
    for block, causal in ((4, True), (4, False), (0, False)):
        want, _ = vq_attention(q, nearest, v, codes, codebook, block=block, causal=causal, impl="blocks")
        q2 = q.clone().requires_grad_(True)
        out, _ = vq_attention(q2, nearest, v, codes, far, block=block, causal=causal, impl="blocks")
        assert_close(out, want, FORMULA)
        out.sum().backward()
        assert q2.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["blocks", "dense"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_dense_attention_but_for_keys_that_are_far(causal, impl):
    q, k, v, codebook = drawn(11, 4)
    codes, nearest = quantize(k, codebook)
    bias = torch.randn(bias_size(2, causal), dtype=torch.float64)
    given = [x.requires_grad_(True) for x in (q, nearest, v, bias)]

    def own(q, k, v, bias):
        return vq_attention(q, k, v, codes, codebook, block=2, causal=causal, bias=bias, impl=impl)[0]

    def whole(q, k, v, bias, cut):
        blocks = torch.arange(11) // 2
        near = (blocks[:, None] - blocks).abs() <= 1
        apart = torch.arange(11)[:, None] - torch.arange(11)
        added = torch.where(near, bias[(apart if causal else apart + 3).clamp(0, len(bias) - 1)], 0.0)
        x = torch.where(near, q @ k.mT, q @ (k.detach() if cut else k).mT) + added
        return x.masked_fill((apart < 0) & causal, -torch.inf).softmax(-1) @ v

    if impl == "blocks":  # where keys that are far are not read
        assert torch.autograd.gradcheck(own, given, fast_mode=True)
    found, want, all_keys = (
        torch.autograd.grad(y.square().sum(), given)
        for y in (own(*given), whole(*given, cut=True), whole(*given, cut=False))
    )
    for mine, other in zip(found, want, strict=True):
        assert_close(mine, other, 4 * FORMULA)
    assert is_far(found[1], all_keys[1], 4 * FORMULA)  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    q, k, v, codebook = drawn(300, 16)
    codes, nearest = quantize(k, codebook)
    want, _ = vq_attention(q, nearest, v, codes, codebook, block=16)
    out, _ = vq_attention(*(x.to(dtype) for x in (q, nearest, v)), codes, codebook.to(dtype), block=16)
    assert out.dtype == dtype
    assert_close(out, want, CLOSE if dtype == torch.float32 else within(dtype, 4))


def test_codebook_is_the_nearest_and_follows_its_keys():
    _, k, _, codebook = drawn(60, 6)
    codes, nearest = quantize(k, codebook)
    away = (k[:, :, :, None] - codebook[None, :, None]).square().sum(-1)
    assert torch.equal(codes, away.argmin(-1))
    assert torch.equal(nearest, codebook[None].expand(2, -1, -1, -1).gather(2, codes[..., None].expand_as(k)))
    counts = torch.ones(H, 6, dtype=torch.float64)
    sums, held = follow(codebook * counts[..., None], counts, k, codes, gamma=0.0)
    for h in range(H):  # one step of Lloyd's
        for s in range(6):
            mine = k[:, h][codes[:, h] == s]
            assert held[h, s] == len(mine)
            if len(mine):
                assert_close(codewords(sums, held)[h, s], mine.mean(0), FORMULA)
    kept, some = follow(codebook * counts[..., None], counts, k, codes, gamma=0.9)
    assert_close(kept, 0.9 * codebook + 0.1 * sums, FORMULA)
    assert_close(some, 0.9 + 0.1 * held, FORMULA)
    assert is_far(kept, sums, FORMULA)


def test_a_codebook_at_rest_is_that_of_k_means():
    """Followed for long at any rate, codewords are the means of their keys, where Lloyd's iterations rest as well."""
    k = torch.randn(1, 1, 200, DK, dtype=torch.float64)
    table = product_codes.fit(k, 1, 5, iterations=100)[0, :, 0]
    assert_close(codewords(*_followed(table, k, 1, 0.9)), table, 4 * FORMULA)
    other = table + 0.05 * torch.randn_like(table)
    rest = codewords(*_followed(other, k, 400, 0.9))
    again = codewords(*_followed(rest, k, 1, 0.0))
    assert_close(rest, again, 1e-12)  # 0.9^400 of what it began with
    assert error(codewords(*_followed(other, k, 5, 0.9)), again) > 1e-6  # control: not yet


def _followed(table, k, steps, gamma):
    counts = torch.nn.functional.one_hot(quantize(k, table)[0], table.shape[1]).to(k.dtype).sum((0, 2))
    sums = table * counts[..., None]
    for _ in range(steps):
        sums, counts = follow(sums, counts, k, quantize(k, codewords(sums, counts))[0], gamma=gamma)
    return sums, counts


def test_dead_codewords_become_keys_and_padding_counts_for_nothing():
    _, k, _, codebook = drawn(40, 6)
    codebook[:, 2] = 100.0  # nobody's
    valid = torch.rand(2, 40) < 0.6
    spoiled = k.masked_fill(~valid[:, None, :, None], 7.0)
    counts = torch.full((H, 6), 0.1, dtype=torch.float64)
    codes, _ = quantize(spoiled, codebook)
    sums, after = follow(codebook * counts[..., None], counts, spoiled, codes, gamma=0.9, dead=0.3, valid=valid)
    assert after[:, 2].eq(1).all()
    fresh = codewords(sums, after)[:, 2]
    for h in range(H):
        keys = k[:, h][valid]
        assert (keys == fresh[h]).all(-1).any()
    each = torch.nn.functional.one_hot(codes, 6).double()
    held, alive = (each * valid[:, None, :, None]).sum((0, 2)), after != 1
    assert_close(after[alive], (0.09 + 0.1 * held)[alive], FORMULA)
    assert is_far(after[alive], (0.09 + 0.1 * each.sum((0, 2)))[alive], FORMULA)  # control: padding counted
    left, still = follow(codebook * counts[..., None], counts, spoiled, codes, gamma=0.9, valid=valid)  # control
    assert_close(codewords(left, still)[:, 2], codebook[:, 2], FORMULA)
    none = follow(sums, after, k, codes, gamma=0.0, valid=torch.zeros_like(valid))  # nothing but padding
    assert codewords(*none).isfinite().all()
