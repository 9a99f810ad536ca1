# SPDX-License-Identifier: Apache-2.0
"""Damped moving averages against their recurrence."""

import pytest
import torch

from manyheads.attention.moving_average import damped_average
from tolerance import FORMULA, assert_close, is_far, within

D, M = 5, 3


def drawn(dtype=torch.float64):
    alpha, delta = (torch.rand(D, M, dtype=dtype) * 0.9 + 0.05 for _ in range(2))
    return alpha, delta, torch.randn(D, M, dtype=dtype), torch.randn(D, M, dtype=dtype)


def reference(x, alpha, delta, beta, eta, h=None):
    h = x.new_zeros(len(x), D, M) if h is None else h
    outs = []
    for t in range(x.shape[1]):
        h = alpha * beta * x[:, t, :, None] + (1 - alpha * delta) * h
        outs.append((eta * h).sum(-1))
    return torch.stack(outs, 1) if outs else x, h


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
def test_is_its_recurrence(length):
    weights, x = drawn(), torch.randn(2, length, D, dtype=torch.float64)
    begun = torch.randn(2, D, M, dtype=torch.float64)
    for state in (None, begun):
        y, after = damped_average(x, *weights, state=state)
        want, last = reference(x, *weights, state)
        assert_close(y, want, FORMULA)
        assert_close(after, last, FORMULA)
    alpha, _, beta, eta = weights  # controls: not damped; and the state forgotten
    assert is_far(y, reference(x, alpha, torch.ones(D, M), beta, eta, begun)[0], FORMULA) or length == 1
    assert is_far(y, reference(x, *weights)[0], FORMULA)


def test_texts_of_several_lengths():
    weights, lengths = drawn(), torch.tensor([260, 128, 1, 0])
    x, begun = torch.randn(4, 260, D, dtype=torch.float64), torch.randn(4, D, M, dtype=torch.float64)
    x[torch.arange(260) >= lengths[:, None]] = 0
    y, after = damped_average(x, *weights, state=begun, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        want, last = reference(x[i : i + 1, :n], *weights, begun[i : i + 1])
        assert_close(y[i : i + 1, :n], want, FORMULA)
        assert_close(after[i : i + 1], last, FORMULA)
    assert is_far(after, damped_average(x, *weights, state=begun)[1], FORMULA)  # control: padding forgets


def test_nothing_comes_back_from_the_future_not_even_a_rounding():
    weights, x = drawn(torch.float32), torch.randn(1, 250, D)
    other = x.clone()
    other[:, 170:] *= 1e6
    assert torch.equal(damped_average(x, *weights)[0][:, :170], damped_average(other, *weights)[0][:, :170])


def test_gradients_and_low_precision():
    weights = [w.requires_grad_(True) for w in drawn()]
    x = torch.randn(1, 5, D, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, D, M, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, h, *w: damped_average(x, *w, state=h), (x, state, *weights), fast_mode=True
    )
    half = x.detach().bfloat16()
    y, after = damped_average(half, *(w.detach().float() for w in weights))
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float32
    want = reference(half.double(), *(w.detach() for w in weights))[0]
    assert_close(y, want, within(torch.bfloat16, 1))
