# SPDX-License-Identifier: Apache-2.0
"""LoRA in the products of a GPU, whose rank is filled up with zeros, is LoRA."""

import torch
from torch.nn.functional import linear

from manyheads.calls.low_rank import LowRank
from tolerance import SAME, assert_close, is_far


def test_a_rank_that_is_filled_up_changes_nothing():
    torch.manual_seed(0)
    made = LowRank({"a.b": (12, 10)}, rank=5, alpha=0.7)
    x, weight, bias = torch.randn(2, 3, 10), torch.randn(12, 10), torch.randn(12)
    down, up = made.matrices("a.b", weight, live=True)
    with torch.no_grad():
        up.normal_()
    wanted = linear(x, weight, bias) + 0.7 * x @ down.mT @ up.mT
    plain, found = made.compute(weight, bias, "a.b", "")(x), made._joined(x, weight, bias, down, up)
    assert_close(plain, wanted, SAME)
    assert_close(found, wanted, SAME)
    assert is_far(made._joined(x, weight, bias, down, -up), wanted, SAME)
    ours, theirs = (torch.autograd.grad(y.square().sum(), [down, up], retain_graph=True) for y in (found, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, SAME)
        assert is_far(2 * mine, other, SAME)
