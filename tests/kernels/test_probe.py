# SPDX-License-Identifier: Apache-2.0
"""The statistics of lenses by blocks; by kernels under Triton's interpreter: interpreted_probe.py."""

import pytest
import torch

from kernels.probe_cases import KINDS, build, errors, flat
from manyheads.calls.fused import visible_ranges
from manyheads.calls.weights import measure
from tolerance import FORMULA, SAME


@pytest.mark.parametrize("block", [None, 1, 16, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_running_sums(kind, block):
    """Against the formula, in float64 and float32; each kind of mask differs from each other kind."""
    for dtype, limit in ((torch.float64, FORMULA), (torch.float32, SAME)):
        case = build(dtype, 70, 90, 2, 32, kind, features=5, rows=2)
        for name in ("features", "weight", "profile"):
            setattr(case, name, getattr(case, name).to(dtype))
        got = flat(case, measure(case.call(), list(case.statistics().values()), block))
        assert max(errors(got, case.truth()).values()) <= limit, errors(got, case.truth())
        assert max(errors(got, case.truth(shift=1)).values()) > 10 * SAME


@pytest.mark.parametrize("kind", KINDS)
def test_visible_ranges(kind):
    case = build(torch.float32, 40, 60, 2, 32, kind)
    lo, hi = (x.expand(2, -1) for x in visible_ranges(case.call()))
    column = torch.arange(60)
    seen = (column >= lo[..., None]) & (column < hi[..., None])
    assert torch.equal(seen, case.mask()[:, 0].expand(2, -1, -1))
    holes = case.mask() & (column % 4 > 0)
    assert visible_ranges(case.call().replace(mask=holes, is_causal=False)) is None
