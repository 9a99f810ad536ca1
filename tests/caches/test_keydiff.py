# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: minus the cosine between a key and the mean direction of all keys."""

import pytest
import torch

from caches.formula import agrees, drive, sequences
from manyheads import parse


def formula(held, k, q, seen):
    unit = [k[s] / k[s].norm() for s in held]
    anchor = sum(unit) / len(unit)
    return [-float(u @ anchor / anchor.norm()) for u in unit]


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "schedule"), [(6, "prefill"), (0.5, "prefill"), (5, "step"), (0.6, 3), (4, "chunk")]
)
def test_against_loops(budget, schedule, heads, padding):
    agrees(parse(f"keydiff:budget={budget},schedule={schedule}"), formula, heads, padding)


def test_control_of_the_loops():
    with pytest.raises(AssertionError):
        agrees(parse("keydiff:budget=6"), lambda *a: [-x for x in formula(*a)])


def test_protected_tokens_stay():
    agrees(parse("keydiff:budget=6,schedule=step,sinks=2,recent=2"), formula)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equals_the_newer_stays(dtype):
    """Equal keys score alike, in any dtype and whatever the sort: the newest are kept, the same ones every time."""
    q, k, v = sequences(2, 4, 300, dtype=dtype)
    k[:] = k[:, :, :1]
    runs = [drive(parse("keydiff:budget=7"), q, k, v, [300])[1][0] for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert runs[0].tolist() == [[list(range(293, 300))] * 2] * 2


def test_the_odd_one_stays():
    q, k, v = sequences(1, 4, 40)
    k[:] = 1.0
    k[0, 0, 7], k[0, 1, 31] = -1.0, -1.0
    _, kept, _ = drive(parse("keydiff:budget=3"), q, k, v, [40])
    assert kept[0].tolist() == [[[7, 38, 39], [31, 38, 39]]]
