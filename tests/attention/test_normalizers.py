# SPDX-License-Identifier: Apache-2.0
"""Every normalizer against its formula in float64: the simplex, optimality, limits, Jacobians, and rows of nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import UserError
from manyheads.attention.normalizers import NORMALIZERS, Normalizer, entmax, log_n_scale, sensitivity
from oracles.normalizers import literal
from tolerance import CLOSE, FORMULA, HALF_FACTOR, assert_close, error, is_far

SIMPLEX = ("softmax", "ssmax", "sparsemax", "entmax15", "entmax", "topk")
LOOSE = 64 * FORMULA  # a threshold that is found to rounding, to a power of up to 10


def drawn(*shape, seed=0, spread=2.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count=6, size=11):
    """Logits and a mask: one row sees a single key, one none, others some."""
    mask = torch.rand(count, size, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[0], mask[1] = False, False
    mask[1, 3] = True
    return drawn(count, size, spread=1.5), mask


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_is_its_formula(kind, temperature):
    x, mask = rows()
    rule = Normalizer(kind, temperature, alpha=1.2, k=3, s=0.3)
    got = rule(x, mask)
    want = torch.zeros_like(x)
    for i in range(1, len(x)):
        want[i, mask[i]] = literal(x[i, mask[i]], kind, 1.2, 3, 0.3, temperature)
    assert_close(got, want, LOOSE)
    assert got[0].eq(0).all() and got[~mask].eq(0).all()
    assert is_far(rule(x), want, LOOSE)  # control: no mask
    assert_close(rule(x.float(), mask), want, 8 * CLOSE)
    other = Normalizer("relu" if kind == "softmax" else "softmax", temperature)
    assert error(other(x, mask), want) > 1e-2  # control: another normalizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_half_precision_rounds_once(kind, dtype):
    x, mask = rows()
    half = x.to(dtype)
    rule = Normalizer(kind, alpha=1.2, k=3, s=0.3)
    want = rule(half.double(), mask)
    assert rule(half, mask).dtype == dtype
    assert error(rule(half, mask), want) <= HALF_FACTOR * max(error(want.to(dtype), want), 1e-4)


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_gradients(kind):
    x, mask = rows()
    rule = Normalizer(kind, 0.7, alpha=1.3, k=3, s=0.3)
    assert torch.autograd.gradcheck(lambda y: rule(y, mask), (x.requires_grad_(),))
    s = torch.full((6, 1), 0.3, dtype=torch.float64, requires_grad=True)
    if kind == "ssmax":
        assert torch.autograd.gradcheck(lambda y: rule(x, mask, y), (s,))

    def wrong(y):  # control: the value, with the gradient at another temperature
        other = Normalizer(kind, 1.4, alpha=1.3, k=3, s=0.3)(y, mask)
        return other + (rule(y, mask) - other).detach()

    assert not torch.autograd.gradcheck(wrong, (x,), raise_exception=False)


def test_sparsemax_is_the_projection():
    """KKT: ``p - x`` is one number where p > 0, and no less elsewhere; entmax has zeros where softmax has none."""
    x = drawn(50, 17)
    p = entmax(x, 2.0)
    gap = p - x
    for row, mine in zip(gap, p > 0, strict=True):
        level = row[mine].mean()
        assert_close(row[mine], level, LOOSE, unit=1.0)
        assert (row[~mine] >= level - 1e-12).all()
    assert ((entmax(x, 1.5) == 0).float().mean() > 0.3) and (x.softmax(-1) > 0).all()
    wrong = x.softmax(-1)
    assert ((wrong - x).std(-1) > 1e-2).all()  # control


def test_limits():
    x = drawn(20, 13)
    assert_close(entmax(x, 1 + 1e-6), x.softmax(-1), 1e-5)
    assert is_far(entmax(x, 1.05), x.softmax(-1), 1e-5)  # control
    assert torch.equal(Normalizer("entmax", alpha=2.0)(x), Normalizer("sparsemax")(x))
    assert torch.equal(Normalizer("entmax", alpha=1.5)(x), Normalizer("entmax15")(x))
    assert_close(Normalizer("topk", k=13)(x), x.softmax(-1), FORMULA)
    assert_close(Normalizer("topk", k=99)(x), x.softmax(-1), FORMULA)
    assert ((Normalizer("topk", k=5)(x) > 0).sum(-1) == 5).all()
    assert_close(Normalizer("ssmax", s=log_n_scale(13))(x), x.softmax(-1), FORMULA)
    assert is_far(Normalizer("ssmax", s=log_n_scale(99))(x), x.softmax(-1), FORMULA)  # control
    best = torch.nn.functional.one_hot(x.argmax(-1), 13).double()
    for kind in SIMPLEX:
        assert_close(Normalizer(kind, 1e-4)(x), best, 1e-9)


@pytest.mark.parametrize("kind", SIMPLEX)
def test_equal_logits_and_shifts(kind):
    x, rule = drawn(5, 9), Normalizer(kind, k=9)
    assert_close(rule(torch.zeros(3, 9)), torch.full((3, 9), 1 / 9), CLOSE)
    assert_close(rule(x + 7), rule(x), LOOSE)
    assert error(Normalizer("sigmoid")(x + 7), Normalizer("sigmoid")(x)) > 0.1  # control: no simplex, no invariance


def test_the_threshold_is_exact_among_many():
    """Newton's steps are fewer than the keys, whatever the spread: steps of logits that fall by halves."""
    for x in (drawn(4, 8192, spread=0.1), drawn(4, 8192, spread=9.0), (0.5 ** torch.arange(60.0)).double()[None]):
        for alpha in (1.05, 1.5, 2.0):
            p = entmax(x, alpha)
            q = torch.where(p > 0, p.pow(alpha - 1) - (alpha - 1) * x, torch.nan)  # -tau
            assert float((q - q.nanmean(-1, keepdim=True)).nan_to_num().abs().max()) < 1e-9
            assert_close(p.sum(-1), torch.ones(len(x)).double(), FORMULA)


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_sensitivity_is_the_norm_of_the_jacobian(kind):
    rule = Normalizer(kind, 0.6, alpha=1.3, k=3, s=0.3)
    for x in drawn(4, 9, seed=3, spread=0.3):
        jacobian = torch.autograd.functional.jacobian(rule, x)
        n = torch.tensor(9.0, dtype=torch.float64)
        got = sensitivity(rule(x), rule, n)
        assert_close(got, jacobian.norm(), LOOSE)
        assert is_far(sensitivity(rule(x), Normalizer(kind, 1.2, alpha=1.3, k=3, s=0.3), n), jacobian.norm())  # control


LOGITS = st.lists(st.floats(-8, 8), min_size=2, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, LOGITS, st.floats(0.1, 5))
def test_bounds_of_softmax(x, other, temperature):
    rule = Normalizer("softmax", temperature)
    p, n, slack = rule(x), len(x), 1 + 1e-9
    jacobian = (p.diag() - p[:, None] * p) / temperature
    norm = float(torch.linalg.matrix_norm(jacobian, 2))
    frobenius = float(sensitivity(p, rule, torch.tensor(float(n))))
    assert jacobian.abs().max() <= slack / (4 * temperature)  # the paper's bound holds of an entry
    assert norm <= frobenius * slack + 1e-7 and frobenius <= slack / (2 * temperature)
    a = p.square().sum()
    assert frobenius <= float((a * (1 - a)).clamp(min=0).sqrt()) * slack / temperature + 1e-7
    reach = float((x.max() - x.min()) / temperature)  # twice M of bounded logits, shifted to their middle
    assert p.max() <= math.exp(reach) / n * slack and p.min() >= math.exp(-reach) / n / slack
    if len(other) == n:
        moved = float((rule(other) - p).norm())
        assert moved <= min(float((other - x).norm()) / (2 * temperature), math.sqrt(2)) * slack + 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(LOGITS, st.sampled_from([1.1, 1.5, 1.8, 2.0]))
def test_entmax_stays_on_the_simplex_and_keeps_the_order(x, alpha):
    p = entmax(x, alpha)
    assert (p >= 0).all() and abs(float(p.sum()) - 1) < 1e-12
    order = x.argsort()
    assert (p[order].diff() >= -1e-12).all()


def test_the_papers_bound_is_no_bound_of_a_norm():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    norm = torch.linalg.matrix_norm(p.diag() - p[:, None] * p, 2)
    assert_close(norm, torch.tensor(0.5, dtype=torch.float64), FORMULA)
    assert norm > min(1 / 4, math.sqrt(2))


def test_refusals():
    for wrong in ({"kind": "hardmax"}, {"alpha": 1.0}, {"alpha": 2.5}, {"k": 0}, {"temperature": 0.0}, {"s": -1.0}):
        with pytest.raises(UserError):
            Normalizer(**wrong)
