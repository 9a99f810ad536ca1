# SPDX-License-Identifier: Apache-2.0
"""LagKV: spread of keys and values relative to the range of the next partition."""

import math

import pytest
import torch

from caches.formula import sequences, site
from caches.rows import Row, agrees, drive
from manyheads import UserError, parse
from manyheads.caches._view import CacheView

SIZES = [21, 1, 1, 4, 1, 1, 1]


def spread(part, after):
    """Softmax over a partition of the standard deviation over channels, channels scaled by the next partition."""
    d = part.shape[1]
    low = [min(float(x[c]) for x in after) for c in range(d)]
    high = [max(float(x[c]) for x in after) for c in range(d)]
    stds = []
    for x in part:
        scaled = [(float(x[c]) - low[c]) / (high[c] - low[c]) if high[c] > low[c] else 0.0 for c in range(d)]
        mean = sum(scaled) / d
        stds.append(math.sqrt(sum((y - mean) ** 2 for y in scaled) / (d - 1)))
    return [math.exp(x) / sum(math.exp(y) for y in stds) for x in stds]


def formula(sinks, lag, keys=True, values=True):
    def score(row, h):
        body = [s for s in row.held[h] if s >= sinks]
        scores = {s: 2.0 + i for i, s in enumerate(body)}  # the tail: the newest highest
        for start in range(0, (len(body) // lag - 1) * lag, lag):
            part, after = body[start : start + lag], body[start + lag : start + 2 * lag]
            parts = [spread(x[h, part], x[h, after]) for x, use in ((row.k, keys), (row.v, values)) if use]
            total = [sum(pair) for pair in zip(*parts, strict=True)]
            for s, mine in zip(part, total, strict=True):
                scores[s] = sum(other < mine for other in total) / lag  # rank: the same share of every partition
        return [scores.get(s, 0.0) for s in row.held[h]]

    return score


@pytest.mark.parametrize("padding", [(0, 0), (0, 6), (3, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "sinks", "lag", "schedule"),
    [(14, 2, 4, "prefill"), (0.6, 3, 3, "prefill"), (13, 0, 4, "step"), (0.7, 1, 5, 3), (12, 2, 3, "chunk")],
)
def test_against_loops(budget, sinks, lag, schedule, heads, padding):
    policy = parse(f"lagkv:budget={budget},sinks={sinks},lag_size={lag},schedule={schedule}")
    agrees(policy, formula(sinks, lag), heads, padding, sizes=SIZES)


def test_control_of_the_loops():
    policy = parse("lagkv:budget=14,sinks=2,lag_size=4")
    agrees(policy, formula(2, 4), sizes=SIZES)
    for wrong in (formula(2, 4, values=False), formula(2, 4, keys=False), formula(2, 5), formula(0, 4)):
        with pytest.raises(AssertionError):
            agrees(policy, wrong, sizes=SIZES)


def test_too_short_to_judge_is_a_window_behind_the_sinks():
    q, k, v = sequences(1, 4, 40)
    _, kept, _ = drive(parse("lagkv:budget=20,sinks=4,lag_size=32"), q, k, v, [40])
    assert kept[0].tolist() == [[[0, 1, 2, 3, *range(24, 40)]] * 2]


def test_a_budget_below_the_tail_keeps_its_newest():
    q, k, v = sequences(1, 4, 40)
    _, kept, _ = drive(parse("lagkv:budget=7,sinks=4,lag_size=8"), q, k, v, [40])
    assert kept[0].tolist() == [[[0, 1, 2, 3, 37, 38, 39]] * 2]


def test_every_partition_gives_the_same_share():
    q, k, v = sequences(1, 4, 4 + 6 * 8)
    _, kept, _ = drive(parse("lagkv:budget=32,sinks=4,lag_size=8"), q, k, v, [52])
    for head in kept[0][0].tolist():
        assert [sum(4 + 8 * p <= s < 12 + 8 * p for s in head) for p in range(6)] == [4] * 5 + [8]


def test_the_token_that_stands_out_stays():
    q, k, v = sequences(1, 4, 24, seed=8)
    k, v = k.clamp(-1, 1), v.clamp(-1, 1)
    k[0, 0, 3, 0], v[0, 1, 6, 2] = 40.0, -40.0
    _, kept, _ = drive(parse("lagkv:budget=10,sinks=0,lag_size=8"), q, k, v, [24])
    assert 3 in kept[0][0, 0] and 6 in kept[0][0, 1]


def seen(k, v, positions):
    counts = positions.amax((1, 2)) + 1
    return CacheView(k, v, positions, counts, None, 1.0, None, None, site())


def test_constant_channels_are_no_division_by_zero():
    _, k, v = sequences(1, 2, 30, seed=9)
    k[..., 0], v[..., 1:] = 2.0, 0.5
    positions = torch.arange(30).expand(1, 2, 30)
    scores = parse("lagkv:sinks=2,lag_size=6,budget=20").score(seen(k, v, positions))
    row = Row(k[0].double(), k[0].double(), v[0].double(), 30, [list(range(30))] * 2)
    for h in range(2):
        want = formula(2, 6)(row, h)
        assert bool(scores[0, h].isfinite().all()) and not any(map(math.isnan, want))
        assert scores[0, h, 2:].argsort().tolist() == sorted(range(28), key=lambda i: (want[2 + i], i))


def test_slots_may_lie_in_any_order_and_some_be_empty():
    _, k, v = sequences(2, 2, 30, seed=10)
    positions = torch.arange(30).expand(2, 2, 30).clone()
    positions[1] = (positions[1] - 7).clamp(min=-1)
    policy = parse("lagkv:sinks=3,lag_size=5,budget=20")
    want = policy.score(seen(k, v, positions))
    order = torch.rand(2, 2, 30, generator=torch.Generator().manual_seed(0)).argsort(-1)
    k, v = (x.gather(2, order[..., None].expand_as(x)) for x in (k, v))
    moved = positions.gather(2, order)
    k[moved < 0], v[moved < 0] = torch.nan, torch.nan
    got, want = policy.score(seen(k, v, moved)), want.gather(2, order)
    assert torch.equal(got[moved >= 3], want[moved >= 3])


@pytest.mark.parametrize("fields", ["lag_size=0", "sinks=-1", "budget=15"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"lagkv:{fields}")
