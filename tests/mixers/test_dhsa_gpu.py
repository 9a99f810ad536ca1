# SPDX-License-Identifier: Apache-2.0
"""DHSA on a GPU: the choice of the CPU, the kernel under it, and memory that does not grow with the square."""

import pytest
import torch

from manyheads import kernels, parse
from manyheads.attention.reference import attention, causal_mask
from manyheads.call import AttentionCall, Site
from tolerance import HALF, assert_close, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]

SITE = Site("layer", 0, 0, "self", True, 9, 3)
SPECS = (
    "dhsa:budget=256",
    "dhsa:budget=256,index=kv",
    "dhsa.rival:by=vertical_slash,budget=256",
    "dhsa.rival:by=minference,index=query,budget=256",
    "dhsa.rival:by=oracle,budget=256",
)


def call(length, dtype=torch.bfloat16, device="cuda"):
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, generator=source).to(device, dtype) for heads in (9, 3, 3))
    return AttentionCall(SITE, q, k, v, 0.2, is_causal=True)


@pytest.mark.parametrize("spec", SPECS)
def test_the_kernel_reads_what_was_chosen(spec):
    strategy, c = parse(spec), call(1500)
    ((_, _, _, row),) = strategy.rows(c)
    mask = causal_mask(1500, 1500, "cuda")[None, None].expand(1, 9, -1, -1).clone()
    mask[:, :, :-64, :-64] &= strategy.pattern(row).to_mask()
    want = attention(c.q.double(), c.k.double(), c.v.double(), scale=c.scale, mask=mask)
    assert_close(strategy.attend(c).double(), want, HALF[torch.bfloat16])
    assert error(strategy.attend(c).double(), c.replace(q=c.q.double(), k=c.k.double(), v=c.v.double()).attend()) > 0.05


@pytest.mark.parametrize("spec", SPECS[:2])
def test_the_choice_is_that_of_the_cpu(spec):
    strategy = parse(spec)
    made = []
    for device in ("cpu", "cuda"):
        ((_, _, _, row),) = strategy.rows(call(1500, torch.float32, device))
        made.append(strategy.pattern(row).blocks().cpu())
    assert (made[0] != made[1]).float().mean() < 1e-3  # scores that nearly tie
    other = parse(spec.replace("256", "224"))  # control
    assert (
        other.pattern(next(other.rows(call(1500, torch.float32)))[3]).blocks().cpu() != made[0]
    ).float().mean() > 1e-2


def test_no_map_of_all_pairs_is_made():
    strategy, c = parse("dhsa:budget=1024"), call(32_768)
    strategy.attend(c)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    strategy.attend(c)
    assert torch.cuda.max_memory_allocated() - before < 32_768**2  # a byte for each pair of one head
