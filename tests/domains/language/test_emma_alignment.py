# SPDX-License-Identifier: Apache-2.0
"""Expected alignments, weights and delays against their definitions, against chance, and where they are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.domains.language.emma import (
    context_weights,
    expected_alignment,
    expected_delays,
    latency_losses,
    preserve_mass,
)
from manyheads.tasks.language.expected_alignment import recursion
from tolerance import CLOSE, DRAWN, FORMULA, WRONG, is_close, is_far, nearly, within

EXACT = ("scan", "matrix")
exact = pytest.mark.parametrize("by", EXACT)


def random_p(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(p):
    """alpha of one head: for each word, over all places where the one before it may have been written."""
    rows, columns = p.shape
    before, found = [1.0] + [0.0] * (columns - 1), []
    for i in range(rows):
        now = [
            sum(before[m] * math.prod(1 - float(p[i, k]) for k in range(m, j)) for m in range(j + 1)) * float(p[i, j])
            for j in range(columns)
        ]
        before = now
        found.append(now)
    return torch.tensor(found, dtype=torch.float64)


@exact
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_definition(by, rows, columns, seed):
    p = random_p(rows, columns, seed=seed)
    got = expected_alignment(p, by)
    assert is_close(got, brute(p), FORMULA) and is_close(recursion(p), brute(p), FORMULA)
    assert is_close(expected_alignment(p.float(), by), brute(p.float()), CLOSE)
    assert (got >= 0).all() and (got.sum(-1) <= 1 + 1e-12).all()
    if rows > 1 and columns > 1:
        assert is_far(expected_alignment(p.flip(0), by), got, FORMULA)


@exact
def test_heads_and_sentences_are_apart(by):
    p = random_p(2, 3, 4, 5)
    got = expected_alignment(p, by)
    for b in range(2):
        for h in range(3):
            assert is_close(got[b, h], brute(p[b, h]), FORMULA)
    assert is_far(got[0, 0], brute(p[0, 1]), FORMULA)


@exact
@pytest.mark.parametrize(("length", "kept"), [(50, 0.9), (200, 1e-3)])
def test_long_sources_lose_nothing_and_mma_all(by, length, kept):
    """In any dtype; MMA's clamp is a bias, not a rounding, for float64 has it too."""
    p = random_p(20, length // 5, length)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        want = recursion(p.to(dtype).double())
        got, biased = (expected_alignment(p.to(dtype), kind).double() for kind in (by, "mma"))
        assert is_close(got, want, within(dtype, 3 * sum(p.shape[1:])))  # three roundings a step
        mass, left = (alpha[:, -1].sum(-1) for alpha in (want, biased))
        assert mass.min() > 1 - 1e-6 and left.mean() < kept
    few = random_p(3, 8)
    assert is_close(expected_alignment(few, "mma", eps=1e-12), brute(few), FORMULA)  # where nothing is clamped


@exact
def test_policies_of_which_all_is_known(by):
    first, last = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    first[:, 0] = 1
    last[:, -1] = 1
    assert torch.equal(expected_alignment(torch.ones(4, 6, dtype=torch.float64), by), first)
    none = expected_alignment(torch.zeros(4, 6, dtype=torch.float64), by)
    assert not none.any() and torch.equal(preserve_mass(none, torch.tensor(6)), last)
    place = torch.arange(6)
    for k in (1, 2, 3):  # wait-k: word i once k + i - 1 are read
        p = (place[None] >= torch.arange(4)[:, None] + k - 1).double()
        want = (place[None] == torch.arange(4)[:, None] + k - 1).double()
        assert torch.equal(expected_alignment(p, by), want)
        delays, variance = expected_delays(preserve_mass(want, torch.tensor(6)))
        assert delays.tolist() == [min(k + i, 6) for i in range(4)] and not variance.any()


@exact
def test_a_constant_probability_is_negative_binomial(by):
    """The i-th word is written after j reads more with C(i + j - 1, j) p^i (1 - p)^j."""
    p = 0.3
    got = expected_alignment(torch.full((4, 9), p, dtype=torch.float64), by)
    want = [[math.comb(i + j, j) * p ** (i + 1) * (1 - p) ** j for j in range(9)] for i in range(4)]
    assert is_close(got, want, FORMULA)


def chi_square(counts, expected):
    some = expected > 5
    return float(((counts - expected)[some] ** 2 / expected[some]).sum()) / int(some.sum())


def test_reading_and_writing_by_chance():
    """A hundred thousand readers stop where alpha says: chi-square by its degrees of freedom, 1 if so."""
    p, rng, many = random_p(3, 6, seed=3), np.random.default_rng(0), 100_000
    place, alive = np.zeros(many, int), np.ones(many, bool)
    got = expected_alignment(p).numpy()
    wrong = expected_alignment(p.flip(0)).numpy()
    for i in range(3):
        moving = alive.copy()
        while moving.any():
            stops = rng.random(many) < p.numpy()[i][np.minimum(place, 5)]
            going = moving & ~stops
            place[going] += 1
            alive &= place < 6
            moving = going & alive
        counts = np.bincount(place[alive], minlength=6)
        spread = math.sqrt(2 / 6)  # of a chi-square of six, by its degrees
        assert chi_square(counts, many * got[i]) < 1 + DRAWN * spread
        assert chi_square(counts, many * wrong[i]) > 1 + WRONG * spread


@given(st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_delays_do_not_fall(seed):
    p = random_p(2, 5, 7, seed=seed)
    delays, variance = expected_delays(preserve_mass(expected_alignment(p), torch.tensor([7, 7])))
    assert (delays.diff(dim=-1) >= -1e-12).all() and (variance >= 0).all()
    assert (delays >= 1).all() and (delays <= 7 + 1e-12).all()


def test_mass_goes_to_the_end_of_each_source():
    p = random_p(2, 3, 4, 6) * torch.tensor([1.0, 1, 1, 1, 0, 0])
    p[1, ..., 2:] = 0
    alpha = expected_alignment(p)
    got = preserve_mass(alpha, torch.tensor([[4], [2]]))
    assert is_close(got.sum(-1), torch.ones(2, 3, 4), FORMULA)
    assert not got[0, ..., 4:].any() and not got[1, ..., 2:].any()  # no padding is looked at
    assert torch.equal(got[0, ..., :3], alpha[0, ..., :3]) and (got[0, ..., 3] > alpha[0, ..., 3]).any()


def weights_by_sums(alpha, u):
    columns = len(u)
    return [
        sum(float(alpha[k]) * math.exp(u[j]) / sum(math.exp(x) for x in u[: k + 1]) for k in range(j, columns))
        for j in range(columns)
    ]


def test_weights_are_a_double_sum():
    alpha = expected_alignment(random_p(2, 3, 6))
    u = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = context_weights(alpha, u, torch.ones(2, 1, 6, dtype=torch.bool))
    want = [[weights_by_sums(alpha[b, i], u[b, i].tolist()) for i in range(3)] for b in range(2)]
    assert is_close(got, want, FORMULA) and is_close(got.sum(-1), alpha.sum(-1), FORMULA)
    assert is_far(alpha * u.softmax(-1), want, FORMULA)
    one = torch.zeros(1, 1, 6, dtype=torch.float64)  # who stops at a place attends to all up to it
    one[..., 3] = 1
    softmax = context_weights(one, u[:1, :1], torch.ones(1, 1, 6, dtype=torch.bool))
    assert is_close(softmax[0, 0, :4], u[0, 0, :4].softmax(-1), FORMULA) and not softmax[0, 0, 4:].any()
    mask = torch.tensor([True] * 4 + [False] * 2).expand(2, 1, 6)
    some = context_weights(alpha[..., :4], u[..., :4], mask[..., :4])
    padded = torch.cat((alpha[..., :4], torch.zeros(2, 3, 2)), -1)
    far = torch.where(mask, u, 1e4)  # energies of padding count for nothing
    assert is_close(context_weights(padded, far, mask)[..., :4], some, FORMULA)


def test_energies_far_apart_give_no_nan():
    u = torch.tensor([[[-200.0, 0.0, 150.0, -90.0]]], requires_grad=True)
    alpha = torch.tensor([[[0.25, 0.25, 0.25, 0.25]]], requires_grad=True)
    got = context_weights(alpha, u, torch.ones(1, 1, 4, dtype=torch.bool))
    got.square().sum().backward()
    assert got.isfinite().all() and u.grad.isfinite().all() and alpha.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@exact
def test_gradients_are_finite_at_certainty(by, dtype):
    for fill in (0.0, 1.0):
        p = torch.full((5, 9), fill, dtype=dtype, requires_grad=True)
        delays, variance = expected_delays(preserve_mass(expected_alignment(p, by), torch.tensor(9)))
        (delays.sum() + variance.sum()).backward()
        assert p.grad.isfinite().all() and p.grad.any()


def test_gradients():
    p = random_p(1, 2, 3, 4).requires_grad_()
    u = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    for by in EXACT:
        assert torch.autograd.gradcheck(lambda p, u, by=by: context_weights(expected_alignment(p, by), u, mask), (p, u))
    source, target = torch.tensor([4]), torch.tensor([3])
    assert torch.autograd.gradcheck(
        lambda p: latency_losses(preserve_mass(expected_alignment(p), source[:, None]), source, target), (p,)
    )


def test_losses_of_heads_and_sentences():
    """By hand: two words of three pieces; a head that waits for one each, one that tosses a coin, and padding."""
    alpha = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    alpha[0, 0, 0, 0] = alpha[0, 0, 1, 1] = 1
    alpha[0, 1, :2, 0] = alpha[0, 1, :2, 2] = 0.5
    alpha[0, :, 2] = torch.tensor([0.2, 0.3, 0.5])  # no word is there
    lag, variance = latency_losses(alpha, torch.tensor([3]), torch.tensor([2]))
    first = ((1 - 0) + (2 - 1.5)) / 2
    second = ((2 - 0) + (2 - 1.5)) / 2
    assert float(lag) == nearly((first + second) / 2) and float(variance) == nearly((0 + 1) / 2)
    sure = latency_losses(alpha[:, :1], torch.tensor([3]), torch.tensor([2]))[1]
    assert float(sure) == 0 < float(variance)
