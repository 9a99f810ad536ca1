# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the device of their tensors, whatever the current device of a thread is."""

import pytest
import torch

from kernels.tile_cases import build, kernel, worst
from manyheads.kernels.recurrence import decay_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("there", [0, 1])
def test_decay_attention_of_any_device(there: int, current: int) -> None:
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 200, 48, dtype=torch.bfloat16) for _ in range(3)]
    want = (x[0] @ x[1].mT).float().tril() @ x[2].float()
    with torch.cuda.device(current):
        leaves = [t.to(torch.device("cuda", there)).requires_grad_() for t in x]
        out = decay_attention(*leaves, None, 1.0, None, None, None, None, None)[0]
        out.sum().backward()
    assert out.device.index == there
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert (out.float().cpu() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("there", [0, 1])
def test_tiles_on_any_device(there: int, current: int) -> None:
    case = build(size=300, width=32, dtype=torch.bfloat16)
    with torch.cuda.device(current):
        got = kernel(case, f"cuda:{there}")
    assert worst(case, got) <= 1
