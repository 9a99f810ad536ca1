# SPDX-License-Identifier: Apache-2.0
"""H2O: attention received so far, summed over queries and the group; the recent part of the budget is kept anyway."""

import math

import pytest
import torch

from caches.formula import sequences
from caches.rows import agrees, drive
from manyheads import UserError, parse


def formula(row, h):
    return [row.mass[h][s] for s in row.held[h]]


def recent(share):
    return lambda s, seen, room: s >= seen - math.floor(room * share)


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (2, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "share", "schedule"),
    [(6, 0.5, "step"), (0.6, 0.5, "step"), (7, 0.3, "prefill"), (5, 0.0, "chunk"), (0.7, 0.75, 3), (5, 1.0, "step")],
)
def test_against_loops(budget, share, schedule, heads, padding):
    policy = parse(f"h2o:budget={budget},recent_share={share},schedule={schedule}")
    agrees(policy, formula, heads, padding, fixed=recent(share))


def test_control_of_the_loops():
    policy = parse("h2o:budget=6")
    agrees(policy, formula, fixed=recent(0.5))
    with pytest.raises(AssertionError):
        agrees(policy, formula, fixed=recent(0.2))
    with pytest.raises(AssertionError):  # the last query alone
        agrees(policy, lambda row, h: row.weights(2 * h, row.seen - 1, row.held[h]).tolist(), fixed=recent(0.5))


def test_sinks_and_recent_stay_too():
    policy = parse("h2o:budget=8,sinks=2,recent=3,recent_share=0.25")
    agrees(policy, formula, fixed=lambda s, seen, room: s < 2 or s >= seen - 3)


def test_many_at_once_gives_what_one_by_one_does_while_nothing_is_dropped():
    """Mass adds up over forwards: the first eviction sees the same sums however the prompt came."""
    q, k, v = sequences(2, 4, 24, seed=4)
    policy = parse("h2o:budget=20,schedule=8")
    runs = [drive(policy, q, k, v, sizes)[1][-1] for sizes in ([16, 8], [16, 3, 5], [16, *[1] * 8])]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_uniform_attention_keeps_the_first_and_the_last():
    """Equal weights: token j gets 1/(j+1) + 1/(j+2) + ..., so the heavy hitters are the first tokens."""
    q, k, v = sequences(1, 4, 20)
    _, kept, _ = drive(parse("h2o:budget=8"), torch.zeros_like(q), k, v, [20])
    assert kept[0].tolist() == [[[0, 1, 2, 3, 16, 17, 18, 19]] * 2]


def test_all_recent_is_a_window():
    q, k, v = sequences(1, 4, 20)
    _, kept, _ = drive(parse("h2o:budget=8,recent_share=1"), q, k, v, [17, 1, 1, 1])
    assert [sorted(held[0, 0].tolist()) for held in kept] == [list(range(n - 8, n)) for n in (17, 18, 19, 20)]


@pytest.mark.parametrize("fields", ["recent_share=1.5", "recent_share=-0.1", "budget=3,sinks=4"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"h2o:{fields}")
