# SPDX-License-Identifier: Apache-2.0
"""The kernels of the lenses under Triton's interpreter, on the CPU. Collected in a process of its own by
test_interpreter.py.

Three ways to the same numbers: the formula in float64, blocks of rows in torch, and the kernels.
"""

import dataclasses

import pytest
import torch

from kernels.interpreted import _mended  # noqa: F401 - a fixture that mends the interpreter
from kernels.probe_cases import KINDS, build, errors, flat
from manyheads import UserError
from manyheads.calls import weights
from manyheads.calls.statistics import Entropy, Pooled
from manyheads.calls.weights import measure
from manyheads.kernels import probe
from tiers import spread
from tolerance import CLOSE, SAME, is_close

CALLS = ((1, 1, 1, 32), (5, 5, 2, 24), (40, 130, 2, 32), (70, 70, 1, 64), (40, 90, 3, 128), (30, 12, 2, 32))


def agree(case):
    """Formula and kernels; and the blocks, which share no line with either. Returns what the kernels said."""
    want, got = case.truth(), case.kernels()
    assert max(errors(got, want).values()) <= SAME, errors(got, want)
    torch_way = flat(case, measure(case.call(), list(case.statistics().values()), block=16))
    assert max(errors(torch_way, want).values()) <= SAME, errors(torch_way, want)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@spread("shape", CALLS, 3)
def test_causal(shape, dtype):
    case = build(dtype, *shape)
    got = agree(case)
    if case.q.shape[2] <= case.k.shape[2] > 4:
        wrong = errors(got, case.truth(shift=1))
        assert min(wrong.values()) > 10 * SAME, wrong


@spread("kind", KINDS, 3)
def test_what_is_seen(kind):
    """Padding on either side, windows, no mask, rows that see nothing; and none of them is another."""
    case = build(torch.float16, 70, 90, 2, 32, kind)
    got = agree(case)
    for other in set(KINDS) - {kind}:
        wrong = errors(got, dataclasses.replace(case, kind=other).truth())
        assert max(wrong["found"], wrong["entropy"]) > 10 * SAME, other


@spread(("features", "rows", "width"), [(2, 3, 1), (40, 33, 300), (17, 16, 50)], 2)
def test_many_features_weights_and_wide_bands(features, rows, width):
    case = build(torch.float32, 40, 70, 2, 32, features=features, rows=rows, width=width)
    got = agree(case)
    for change in (
        {"features": case.features.flip(2)}, {"weight": case.weight.flip(1)}, {"counted": ~case.counted},
        {"profile": case.profile + 1}, {"cells": 6},
    ):  # fmt: skip
        assert max(errors(got, dataclasses.replace(case, **change).truth()).values()) > 10 * SAME, change


def test_sharp_rows_and_far_tails():
    """Logits in the hundreds, and a sink beside very many tiny weights, whose sum half floats would lose."""
    sharp = build(torch.float32, 40, 60, 2, 32, spread=60.0)
    size = float(sharp.truth()["lse"].square().mean().sqrt())  # of a logit, whose last bit a weight errs by
    assert max(errors(sharp.kernels(), sharp.truth()).values()) <= CLOSE * size
    case = build(torch.float32, 32, 520, 1, 16, batch=1)
    q, k = torch.zeros_like(case.q), torch.zeros_like(case.k)
    q[..., 0], k[:, :, 0, 0] = 1.0, 4 * 18.0  # the sink's weight is e^18 times that of another key
    case = dataclasses.replace(case, q=q, k=k)
    mass = 519 / (519 + torch.tensor(18.0).double().exp())
    features = torch.ones(1, 520, 1)
    features[:, 0] = 0
    found = probe.row_statistics(q, k, scale=0.25, features=features).found
    assert abs(float(found[0, 0, -1, 0]) / float(mass) - 1) < SAME
    assert abs(float(found[0, 0, -1, 0].half()) / float(mass) - 1) > SAME


def test_measure_takes_kernels_and_blocks_together(monkeypatch):
    """What has no kernel is made by blocks in the same call, in order; what is beyond the kernels too."""
    monkeypatch.setattr(weights, "_has_kernels", lambda call: True)
    asked = []
    true = probe.row_statistics
    monkeypatch.setattr(probe, "row_statistics", lambda *a, **k: asked.append(1) or true(*a, **k))

    class Custom(Entropy):
        """Not one of the engine's own."""

    for kind in KINDS:
        case = build(torch.float32, 40, 60, 2, 32, kind)
        wanted = [Custom(), *case.statistics().values(), Pooled(2), Entropy()]
        first, *found, cells, last = measure(case.call(), wanted)
        assert max(errors(flat(case, found), case.truth()).values()) <= SAME
        assert is_close(first, last) and cells.shape[2:] == (2, 2)
    assert len(asked) == 3 * len(KINDS)  # a sum of squares and one of cubes are asked for at scales of their own
    call = build(torch.float32, 40, 60, 2, 32).call()
    holes = (torch.arange(60) % 4 > 0).expand(2, 1, 40, 60)
    for beyond in (
        {"softcap": 5.0}, {"sinks": torch.zeros(4)}, {"bias": torch.zeros(40, 60)}, {"mask": holes},
        {"mask": torch.ones(2, 4, 40, 60, dtype=torch.bool)}, {"q": call.q.double(), "k": call.k.double()},
    ):  # fmt: skip
        got, want = measure(call.replace(**beyond), [Entropy()]), measure(call.replace(**beyond), [Entropy()], 7)
        assert is_close(got[0], want[0])
    assert len(asked) == 3 * len(KINDS)  # a sum of squares and one of cubes are asked for at scales of their own


def test_strangers_are_refused():
    q, k = torch.randn(1, 4, 3, 32), torch.randn(1, 3, 3, 32)
    for given in ((q, k), (q, k[:, :2].half()), (q, k[:, :2, :, :16])):
        with pytest.raises(UserError, match="attention probe"):
            probe.row_statistics(*given, scale=1.0)
    with pytest.raises(UserError, match="attention probe"):
        probe.row_statistics(q, k[:, :2], scale=-1.0)


def test_of_equal_logits_the_first_counts():
    q, k = torch.zeros(1, 4, 40, 16), torch.randn(1, 2, 90, 16)
    found = probe.row_statistics(q, k, scale=1.0, peak=True)
    assert not found.column.any() and not found.peak.any()
    ends = torch.arange(40)[None]
    later = probe.row_statistics(q, k, scale=1.0, peak=True, spans=(ends + 3, ends + 50))
    assert torch.equal(later.column, (ends + 3).int()[:, None].expand(1, 4, -1))
