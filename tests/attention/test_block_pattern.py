# SPDX-License-Identifier: Apache-2.0
"""Block patterns and their builders against masks that are written from the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads import UserError
from manyheads.attention import patterns
from manyheads.attention.block_pattern import BlockPattern, Rule, refined
from manyheads.attention.flex_mask import block_mask
from tolerance import assert_close

RULES = [Rule(), Rule(True, 7), Rule(False), Rule(False, 7)]


def seen(rule, length, size):
    """The rule, from positions."""
    apart = torch.arange(length)[:, None] + size - length - torch.arange(size)
    mask = apart >= 0 if rule.causal else torch.ones_like(apart, dtype=torch.bool)
    return mask if rule.window is None else mask & (apart < rule.window) & (apart > -rule.window)


def in_blocks(mask, block_q, block_k):
    """Which blocks have any true pair of ``mask [T, S]``."""
    length, size = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -size % block_k, 0, -length % block_q))
    return padded.unflatten(1, (-1, block_k)).unflatten(0, (-1, block_q)).any(3).any(1)


@given(
    length=st.integers(1, 30), size=st.integers(1, 30), block_q=st.sampled_from([1, 3, 8]),
    block_k=st.sampled_from([1, 4, 5, 16, 64]), rule=st.sampled_from(RULES), density=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_lists_spans_and_density(length, size, block_q, block_k, rule, density, seed):
    """What is seen whole is, what may be seen is held, in both directions; the density is that of the mask."""
    torch.manual_seed(seed)
    rows, columns = -(-length // block_q), -(-size // block_k)
    blocks = torch.rand(2, 1, rows, columns) < density
    pattern = BlockPattern.from_blocks(blocks, length, size, block_q=block_q, block_k=block_k)
    assert torch.equal(pattern.blocks(), blocks) and torch.equal(pattern.counts, blocks.sum(-1).int())
    allowed = seen(rule, length, size)
    total = 2 * allowed.sum()
    mask = pattern.to_mask(rule)
    assert torch.equal(mask, pattern.to_mask() & allowed)
    assert pattern.density(rule) == pytest.approx(float(mask.sum() / total.clamp(min=1)))
    whole = ~in_blocks(~allowed, block_q, block_k)
    some = in_blocks(allowed, block_q, block_k)
    check(pattern.lists(rule), blocks, whole, some, columns, size % block_k > 0)
    tile = pattern.tile
    assert tile == block_k or (tile <= 64 and tile % block_k == 0)
    each = tile // block_k
    tiles = torch.nn.functional.pad(blocks, (0, -columns % each)).unflatten(3, (-1, each)).any(4).transpose(2, 3)
    turned = pattern.transposed(rule)
    whole = ~in_blocks(~allowed, block_q, tile).T
    check(turned, tiles, whole, in_blocks(allowed, block_q, tile).T, rows, length % block_q > 0, turned.bits is None)
    if turned.bits is not None:
        for n, b, j, w in zip(*torch.where(turned.indices < rows), strict=True):
            bits = [bool(turned.bits[n, b, j, w] >> i & 1) for i in range(each)]
            row = blocks[n, b, turned.indices[n, b, j, w], j * each : (j + 1) * each].tolist()
            assert bits == row + [False] * (each - len(row))


def check(lists, blocks, whole, some, columns, cut, exact=True):
    for n in range(blocks.shape[0]):
        lengths = []
        for i in range(blocks.shape[2]):
            first, left, right, last = lists.spans[n, 0, i].tolist()
            assert first <= left <= right <= last
            lengths.append(last - first)
            entries = [e for e in lists.indices[n, 0, i].tolist() if e < columns]
            assert entries == torch.where(blocks[n, 0, i])[0].tolist()
            assert all(whole[i, e] for e in entries[left:right])
            assert not any(some[i, e] for e in entries[:first] + entries[last:])
            if exact:  # nothing that is seen whole is masked, but a last block that is cut off
                masked = entries[first:left] + entries[right:last]
                assert not any(whole[i, e] and not (cut and e == columns - 1) for e in masked)
        order = lists.order[n, 0].tolist()
        assert [lengths[i] for i in order] == sorted(lengths, reverse=True)


@given(
    length=st.integers(1, 30), extra=st.integers(0, 12), block_q=st.sampled_from([1, 4, 7]),
    block_k=st.sampled_from([1, 3, 8]), rule=st.sampled_from(RULES),
)  # fmt: skip
def test_builders_from_positions(length, extra, block_q, block_k, rule):
    size = length + extra
    blocks = {"block_q": block_q, "block_k": block_k}
    t, s = torch.arange(length)[:, None] + extra, torch.arange(size)
    made = patterns.dense(length, size, rule=rule, **blocks)
    assert torch.equal(made.blocks()[0, 0], in_blocks(seen(rule, length, size), block_q, block_k))
    assert made.density(rule) == 1
    sinks = (s < 3) | (t >= size - 2)
    made = patterns.sinks(length, size, 3, 2, **blocks)
    assert torch.equal(made.blocks()[0, 0], in_blocks(sinks, block_q, block_k))
    made = patterns.a_shape(length, size, 3, 5, **blocks)
    shape = in_blocks(seen(Rule(True, 5), length, size), block_q, block_k) | in_blocks(
        (s < 3) & (t >= 0), block_q, block_k
    )
    assert torch.equal(made.blocks()[0, 0], shape)
    vertical, slash = torch.tensor([[[1, size - 1]]]), torch.tensor([[[0, 6], [2, 2]]])
    made = patterns.vertical_slash(vertical, slash, length, size, **blocks)
    for h, lines in enumerate(slash[0].tolist()):
        line = (t >= 0) & ((s == 1) | (s == size - 1))
        for distance in lines:
            low = (t - (t - extra) % block_q - distance)[:, :1]  # all that the block's queries have on the line
            high = torch.minimum(low + block_q - 1, torch.tensor(size - 1 - distance))
            line = line | ((s >= low) & (s <= high))
        assert torch.equal(made.blocks()[0, h], in_blocks(line, block_q, block_k))


def test_packed():
    bounds = torch.tensor([0, 5, 5, 17, 30])
    owner = torch.bucketize(torch.arange(30), bounds, right=True)
    mask = (owner[:, None] == owner) & seen(Rule(), 30, 30)
    made = patterns.packed(bounds, block_q=4, block_k=2).blocks()[0, 0]
    assert (made | ~in_blocks(mask, 4, 2)).all() and made.sum() <= in_blocks(mask, 4, 2).sum() + 4
    assert not torch.equal(made, patterns.dense(30, 30, block_q=4, block_k=2).blocks()[0, 0])


def test_top_k_and_top_p():
    scores = torch.randn(1, 2, 5, 10)
    sizes = {"block_q": 8, "block_k": 4}
    visible = in_blocks(seen(Rule(), 40, 40), 8, 4)
    made = patterns.top_k(scores, 3, 40, 40, **sizes).blocks()
    hidden = scores.masked_fill(~visible, -torch.inf)
    for h in range(2):
        for i in range(5):
            want = [j for j in hidden[0, h, i].argsort(descending=True).tolist()[:3] if visible[i, j]]
            assert torch.where(made[0, h, i])[0].tolist() == sorted(want)
    shares = hidden.softmax(-1)
    for mass, least, most in ((0.5, 1, None), (0.9, 1, None), (0.9, 1, 2), (0.01, 3, None)):
        made = patterns.top_p(scores, mass, 40, 40, least=least, most=most, **sizes).blocks()
        assert not (made & ~visible).any()
        held, counts = (shares * made).sum(-1), made.sum(-1)
        free = most is None
        assert ((held >= mass - 1e-6) | (not free) * (counts == most)).all()
        smallest = shares.masked_fill(~made, 2.0).amin(-1)
        assert ((held - smallest < mass) | (counts <= least)).all()  # none could be left out
    assert patterns.top_p(scores, 1.0, 40, 40, **sizes).blocks().equal(visible.expand(1, 2, -1, -1))


def test_block_means_and_scores():
    x, valid = torch.randn(2, 3, 10, 4), torch.rand(2, 10) < 0.6
    valid[0, 8:] = False
    means = patterns.block_means(x, 4, valid)
    for b in range(2):
        for i in range(3):
            part = x[b, :, 4 * i : 4 * i + 4][:, valid[b, 4 * i : 4 * i + 4]]
            want = part.mean(1) if part.shape[1] else torch.zeros(3, 4)
            assert_close(means[b, :, i], want)
    scores = patterns.mean_scores(x, x[:, :1], scale=0.5, block_q=5, block_k=4, valid=valid)
    assert scores.shape == (2, 3, 2, 3) and (scores[0, :, :, 2] == -torch.inf).all()
    want = 0.5 * (x[1, 2, 5:].mean(0) * patterns.block_means(x, 4, valid)[1, 0, 0]).sum()
    assert_close(scores[1, 2, 1, 0], want)


def test_algebra():
    a = BlockPattern.from_lists(torch.tensor([[[[2, 0, 2, -1], [-1, -1, -1, 1]]]]), 8, 12, block_q=4, block_k=4)
    assert a.counts.tolist() == [[[2, 1]]] and a.indices[0, 0, 0, :2].tolist() == [0, 2]
    b = patterns.sinks(8, 12, 2, block_q=2, block_k=2)
    for made, want in (
        (a | b, a.to_mask() | b.to_mask()), (a & b, a.to_mask() & b.to_mask()), (~a, ~a.to_mask()),
        (refined(a, 2, 1), a.to_mask()),
    ):  # fmt: skip
        assert torch.equal(made.to_mask(), want)
    with pytest.raises(UserError, match="divide"):
        refined(a, 3, 1)
    with pytest.raises(UserError, match="different numbers"):
        a | patterns.dense(8, 13)
    with pytest.raises(UserError, match="int32"):
        BlockPattern(torch.zeros(1, 1, 1, 3, dtype=torch.int64), 4, 4, 8, 12)
    with pytest.raises(UserError, match="mask of blocks"):
        BlockPattern.from_blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), 8, 12, block_q=4, block_k=4)
    with pytest.raises(UserError, match="scores"):
        patterns.top_k(torch.zeros(1, 1, 3, 3), 1, 8, 12, block_q=4, block_k=4)


@pytest.mark.parametrize("block", [64, 128, 256])
def test_flex_mask(block):
    """FlexAttention's mask of the same pairs, made from lists where it takes such blocks, and else from a function."""
    pattern = BlockPattern.from_blocks(
        torch.rand(1, 2, -(-500 // block), -(-600 // block)) < 0.5, 500, 600, block_q=block, block_k=block
    )
    for rule in RULES[:2]:
        mask = block_mask(pattern, rule)
        kept = torch.zeros(1, 2, 500, 600, dtype=torch.bool)
        size_q, size_k = mask.BLOCK_SIZE
        t, s = torch.arange(500)[:, None], torch.arange(600)
        for counts, indices, whole in (
            (mask.kv_num_blocks, mask.kv_indices, False), (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):  # fmt: skip
            for _, h, i in zip(*torch.where(counts > 0), strict=True):
                for j in indices[0, h, i, : counts[0, h, i]].tolist():
                    here = (t // size_q == i) & (s // size_k == j)
                    kept[0, h] |= here if whole else here & mask.mask_mod(torch.tensor(0), h, t, s)
        assert torch.equal(kept, pattern.to_mask(rule).expand(1, 2, -1, -1))
