# SPDX-License-Identifier: Apache-2.0
"""AL, LAAL, DAL and AP by hand, and of policies whose lag is known."""

import pytest
import torch

from manyheads.attention.latency import average_lagging, average_proportion, differentiable_average_lagging
from tolerance import nearly


def tensors(delays, source, *lengths):
    given = (delays, source, *(lengths or (len(delays),)))
    return [torch.tensor(x, dtype=torch.float64) for x in given]


@pytest.mark.parametrize(
    ("delays", "source", "al", "laal", "dal", "ap"),
    [  # laal of a reference of four words
        ([1, 2, 3, 4], 4, 1, 1, 1, 10 / 16),
        ([4, 4, 4, 4], 4, 4, 4, 4, 1),
        ([2, 3, 3], 3, ((2 - 0) + (3 - 1)) / 2, ((2 - 0) + (3 - 3 / 4)) / 2, (2 + 2 + 2) / 3, 8 / 9),
        ([1, 4], 4, ((1 - 0) + (4 - 2)) / 2, ((1 - 0) + (4 - 1)) / 2, (1 + 2) / 2, 5 / 8),
        ([1, 1, 1, 1, 2], 2, (1 + 0.6 + 0.2 - 0.2 + 0.4) / 5, (1 + 0.6 + 0.2 - 0.2 + 0.4) / 5, 1 + 2e-17, 6 / 10),
        ([1, 3, 3, 3, 3, 3], 3, (1 + 2.5) / 2, (1 + 2.5) / 2, (1 + 2.5 * 5) / 6, 16 / 18),
    ],
)
def test_by_hand(delays, source, al, laal, dal, ap):
    """In the fifth the output is longer: a reader who never waits is ahead at first, which DAL does not count."""
    given = tensors(delays, source)
    assert float(average_lagging(*given)) == nearly(al)
    reference = torch.tensor(4.0, dtype=torch.float64)
    assert float(average_lagging(*given, reference)) == nearly(laal)
    assert float(differentiable_average_lagging(*given)) == nearly(dal)
    assert float(average_proportion(*given)) == nearly(ap)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_wait_k_lags_by_k(k):
    given = tensors([min(k + i, 8) for i in range(8)], 8)
    lag = min(k, 8)
    assert float(average_lagging(*given)) == nearly(lag)
    assert float(differentiable_average_lagging(*given)) == nearly(lag)
    assert (float(average_lagging(*tensors([min(k + 1 + i, 8) for i in range(8)], 8))) == nearly(lag)) == (k > 7)


def test_padding_counts_for_nothing():
    """And rows are apart."""
    delays = torch.tensor([[1.0, 2, 99, 99], [2, 3, 3, 4]])
    source, target = torch.tensor([2, 4]), torch.tensor([2, 4])
    for of in (average_lagging, differentiable_average_lagging, average_proportion):
        alone = [float(of(*tensors(row, x))) for row, x in (([1, 2], 2), ([2, 3, 3, 4], 4))]
        assert of(delays, source, target).tolist() == [nearly(x, torch.float32) for x in alone]
        assert float(of(delays, source, torch.tensor([4, 4]))[0]) != nearly(alone[0], torch.float32)


def test_gradients():
    delays = torch.tensor([[1.0, 2.5, 2.7]], dtype=torch.float64, requires_grad=True)
    lengths = (torch.tensor([4]), torch.tensor([3]))
    for of in (average_lagging, differentiable_average_lagging, average_proportion):
        assert torch.autograd.gradcheck(lambda d, of=of: of(d, *lengths), (delays,))
