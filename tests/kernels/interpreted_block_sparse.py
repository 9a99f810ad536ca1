# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention's kernels under Triton's interpreter, on the CPU. Collected in a process of its own by
test_interpreter.py. Float32 and float16 only: the interpreter computes bfloat16 wrongly.
"""

import pytest
import torch

from kernels.interpreted import _mended  # noqa: F401 - a fixture that mends the interpreter
from kernels.sparse_cases import build, errors, kernel, worst, wrong_variants
from manyheads import UserError
from manyheads.attention import patterns
from manyheads.attention.block_pattern import BlockPattern
from manyheads.attention.sparse import block_sparse_attention
from manyheads.kernels import block_sparse_hopper
from tiers import spread

CASES = [
    {"length": 1},
    {"length": 33, "block_q": 32, "block_k": 64},
    {"length": 70, "block_q": 64, "block_k": 128, "dtype": torch.float16},
    {"length": 40, "size": 75, "block_k": 8, "width": 24, "columns": 40},
    {"length": 30, "size": 47, "block_k": 1, "density": 0.3, "shared": True},
    {"length": 37, "block_q": 4, "block_k": 32, "window": 9},
    {"length": 60, "size": 41, "causal": False, "heads": 4, "kv_heads": 2, "batch": 2, "dtype": torch.float16},
    {"length": 50, "causal": False, "window": 13, "block_k": 32},
    {"length": 45, "size": 90, "padded": True, "batch": 2, "block_k": 64},
    {"length": 66, "packed": [0, 5, 5, 40, 66], "block_k": 1, "biased": True},
    {"length": 40, "size": 30, "biased": True, "block_q": 32},  # the first queries have no key
    {"length": 34, "size": 140, "block_q": 32, "block_k": 128, "density": 1.0, "heads": 3},
]


@spread("given", CASES, 8, ids=str)
def test_both_ways(given):
    """Kernel and torch in the dtype of the case, within the same limits of the formula in float64."""
    case = build(**given)
    got = kernel(case)
    assert worst(case, got) <= 1, errors(case, got)
    twin = case.run("torch")
    assert worst(case, twin) <= 1, errors(case, twin)


@pytest.mark.parametrize(
    "given", [{"window": 20, "block_k": 8}, {"packed": [0, 20, 48], "biased": True}, {"padded": True}]
)
def test_wrong_variants_fail(given):
    case = build(length=48, **given)
    got = kernel(case)
    assert worst(case, got) <= 1
    for name, wrong in wrong_variants(case).items():
        assert worst(wrong, got) > 100, name


def test_entries_out_of_sight_are_left_out():
    """What the rule hides is not even read: keys of hidden blocks may be NaN."""
    pattern = patterns.dense(64, 64, block_q=16, block_k=16, rule=None)
    everything = BlockPattern.from_blocks(torch.ones(1, 1, 4, 4, dtype=torch.bool), 64, 64, block_q=16, block_k=16)
    q, k = torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 16)
    k[:, :, 48:] = torch.nan
    for x in (pattern, everything):
        out = block_sparse_attention(q, k, k, x, scale=1.0, impl="triton")
        assert out[:, :, :48].isfinite().all() and out[:, :, 48:].isnan().all()


def test_kernels_for_hopper_are_not_reached(monkeypatch):
    """They are Gluon, which has no interpreter. The call is one that they would take on their GPU."""
    case = build(length=20, heads=1, block_q=128, block_k=128, width=64, columns=64, dtype=torch.float16)

    def reached(*_):
        raise AssertionError("a kernel for Hopper")

    monkeypatch.setattr(block_sparse_hopper, "forward", reached)
    monkeypatch.setattr(block_sparse_hopper, "backward", reached)
    assert worst(case, kernel(case)) <= 1
    monkeypatch.setattr(block_sparse_hopper, "refusal", lambda *_: None)
    with pytest.raises(AssertionError, match="for Hopper"):
        kernel(case)


def test_strangers_are_refused():
    q = torch.randn(1, 1, 12, 16)
    pattern = patterns.dense(12, 12, block_q=3, block_k=4)
    with pytest.raises(UserError, match="power of two"):
        block_sparse_attention(q, q, q, pattern, scale=1.0, impl="triton")
    with pytest.raises(UserError, match="16 and 32 bit"):
        block_sparse_attention(*[q.double()] * 3, patterns.dense(12, 12), scale=1.0, impl="triton")
    with pytest.raises(UserError, match="256"):
        block_sparse_attention(*[torch.randn(1, 1, 12, 300)] * 3, patterns.dense(12, 12), scale=1.0, impl="triton")
