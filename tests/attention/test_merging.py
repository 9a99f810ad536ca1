# SPDX-License-Identifier: Apache-2.0
"""Groupings: against loops, what is kept of order and size, padding, ties, and the way back."""

import pytest
import torch

from manyheads.attention.merging import Grouping, adjacent, matched
from tolerance import FORMULA, assert_close, error

LENGTHS = torch.tensor([11, 6, 1, 0])


def drawn(length=11, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)


def real(length=11):
    return torch.arange(length) < LENGTHS[:, None]


def halves(held):
    return -(held // -2)


def test_reduce_and_restore_are_loops():
    x, weights = drawn(), torch.rand(4, 11, dtype=torch.float64)
    into = torch.randint(4, (4, 11), generator=torch.Generator().manual_seed(1))  # 3: of none
    into[0] = into[0].clamp(max=1)
    grouping = Grouping(into, 3)
    got = grouping.reduce(x, weights)
    for b in range(4):
        for group in range(3):
            held = [t for t in range(11) if into[b, t] == group]
            total = sum(weights[b, t] for t in held)
            want = sum(weights[b, t] * x[b, t] for t in held) / total if held else torch.zeros(5).double()
            assert_close(got[b, group], want, FORMULA)
            assert_close(grouping.totals(weights)[b, group], torch.as_tensor(total, dtype=x.dtype), FORMULA)
    back = grouping.restore(got)
    for b, t in torch.cartesian_prod(torch.arange(4), torch.arange(11)).tolist():
        want = got[b, into[b, t]] if into[b, t] < 3 else torch.zeros(5).double()
        assert torch.equal(back[b, t], want)
    later = Grouping(torch.tensor([[0, 0, 1], [1, 0, 2], [2, 0, 0], [0, 1, 2]]), 2)
    both = grouping.then(later)
    want = [[2 if g == 3 else int(later.into[b, g]) for g in into[b].tolist()] for b in range(4)]
    assert both.into.tolist() == want and both.count == 2
    plain = torch.ones(4, 3)
    assert torch.equal(
        both.restore(later.reduce(got, plain)), grouping.restore(later.restore(later.reduce(got, plain)))
    )


def literal_matching(metric, held, kept):
    """ToMe by loops over one row: group of each token, in the order of the tokens that stay."""
    unit = metric / metric.norm(dim=1, keepdim=True)
    pairs = []
    for a in range(0, held, 2):
        partners = [(round(4096 * float(unit[a] @ unit[b])), -b) for b in range(1, held, 2)]
        if partners:
            score, b = max(partners)
            pairs.append((-score, a, -b))
    joins = {a: b for _, a, b in sorted(pairs)[: held - kept]}
    stays = [t for t in range(held) if t not in joins]
    return [stays.index(joins.get(t, t)) for t in range(held)]


@pytest.mark.parametrize("fewer", [0, 1, 3, 5])
def test_matching_is_its_loop(fewer):
    metric, held = drawn(), LENGTHS
    kept = torch.maximum(held - fewer, halves(held))
    grouping = matched(metric, real(), kept, 11 - fewer)
    for b, n in enumerate(held.tolist()):
        want = literal_matching(metric[b], n, int(kept[b]))
        assert grouping.into[b, :n].tolist() == want
        assert (grouping.into[b, n:] == 11 - fewer).all()
    chance = matched(metric, real(), kept, 11 - fewer, choose="random")
    assert torch.equal(chance.into, grouping.into) == (fewer == 0)  # control: partners matter
    assert torch.equal(chance.totals(real().double()).sum(1), held.double())


@pytest.mark.parametrize("how", ["adjacent", "matched"])
def test_sizes_sum_to_the_tokens_and_padding_joins_none(how):
    ones = real().double()
    grouping = adjacent(real(), 2, 6) if how == "adjacent" else matched(drawn(), real(), halves(LENGTHS), 6)
    sizes = grouping.totals(ones)
    assert sizes.sum(1).tolist() == LENGTHS.tolist()
    assert (sizes > 0).sum(1).tolist() == halves(LENGTHS).tolist()
    x = drawn()
    want = grouping.reduce(x, ones)
    wrong = torch.where(real()[..., None], x, torch.full_like(x, 1e6))
    assert torch.equal(grouping.reduce(wrong, ones), want)
    careless = adjacent(torch.ones_like(real()), 2, 6) if how == "adjacent" else matched(
        wrong, torch.ones_like(real()), torch.full((4,), 6), 6
    )  # fmt: skip
    assert error(careless.reduce(wrong, torch.ones_like(ones)), want) > 1  # control: padding taken for tokens


def test_nothing_merged_is_the_identity_and_equal_tokens_merge_without_loss():
    x, every = drawn(), torch.ones(4, 11, dtype=torch.bool)
    for grouping in (adjacent(every, 1, 11), matched(x, every, torch.full((4,), 11), 11)):
        assert torch.equal(grouping.reduce(x, every.double()), x) and torch.equal(grouping.restore(x), x)
    twice = x.repeat_interleave(2, 1)
    every = torch.ones(4, 22, dtype=torch.bool)
    for grouping in (adjacent(every, 2, 11), matched(twice, every, torch.full((4,), 11), 11)):
        assert_close(grouping.restore(grouping.reduce(twice, every.double())), twice, FORMULA)
    chance = matched(twice, every, torch.full((4,), 11), 11, choose="random")
    assert error(chance.restore(chance.reduce(twice, every.double())), twice) > 0.1  # control


def test_ties_are_decided_alike_and_leave_gradients_finite():
    x = torch.ones(2, 8, 3, requires_grad=True)
    grouping = matched(x, torch.ones(2, 8, dtype=torch.bool), torch.tensor([5, 5]), 5)
    assert torch.equal(grouping.into[0], grouping.into[1])
    assert grouping.into[0].tolist() == [0, 0, 0, 1, 0, 2, 3, 4]  # the first three of the even columns join column 1
    for weights in (torch.ones(2, 8), torch.zeros(2, 8)):
        (gradient,) = torch.autograd.grad(grouping.reduce(x, weights).sum(), x)
        assert gradient.isfinite().all() and gradient.any() == weights.any()
    zero = torch.zeros(2, 8, 3)
    assert torch.equal(matched(zero, torch.ones(2, 8, dtype=torch.bool), torch.tensor([5, 5]), 5).into, grouping.into)


def test_gradients():
    into = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 3, 0, 1]])
    x, weights = drawn(5, 2).requires_grad_(True), torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Grouping(into, 3).reduce, (x, weights))
    assert torch.autograd.gradcheck(Grouping(into, 3).restore, (drawn(3, 2).requires_grad_(True),))


def test_a_row_of_its_own_ratio():
    grouping = adjacent(torch.ones(2, 6, dtype=torch.bool), torch.tensor([3, 1]), 6)
    assert grouping.into.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]]
    assert matched(drawn(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.tensor([1]), 1).into.tolist() == [[0]]
