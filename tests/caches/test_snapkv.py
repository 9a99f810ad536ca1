# SPDX-License-Identifier: Apache-2.0
"""SnapKV: attention weights of the last queries on what is before them, summed, pooled over neighbours and a group."""

import math

import pytest

from caches.formula import DIM, agrees, drive, sequences
from manyheads import UserError, parse


def formula(window, kernel, own=False):
    """The score of each held token, from the definition; ``own``: keys of the window have votes too (wrong)."""

    def score(held, k, q, seen):
        votes = [0.0] * len(held)
        for head in q:
            for t in range(max(0, seen - window), seen):
                e = [math.exp(float(head[t] @ k[s]) / math.sqrt(DIM)) if s <= t else 0.0 for s in held]
                votes = [x + y / sum(e) / len(q) for x, y in zip(votes, e, strict=True)]
        votes = [x if own or s < seen - window else 0.0 for x, s in zip(votes, held, strict=True)]
        reach = kernel // 2
        return [sum(votes[max(0, i - reach) : i + reach + 1]) / kernel for i in range(len(held))]

    return score


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (2, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "window", "kernel", "schedule"),
    [(6, 3, 3, "prefill"), (0.8, 2, 1, "prefill"), (7, 4, 5, "step"), (0.7, 2, 3, 3), (5, 1, 3, "chunk")],
)
def test_against_loops(budget, window, kernel, schedule, heads, padding):
    policy = parse(f"snapkv:budget={budget},window_size={window},kernel_size={kernel},schedule={schedule}")
    agrees(policy, formula(window, kernel), heads, padding)


def test_control_of_the_loops():
    with pytest.raises(AssertionError):
        agrees(parse("snapkv:budget=6,window_size=3,kernel_size=3"), formula(3, 1))
    with pytest.raises(AssertionError):
        agrees(parse("snapkv:budget=6,window_size=3,kernel_size=3"), formula(2, 3))
    with pytest.raises(AssertionError):
        agrees(parse("snapkv:budget=8,window_size=3,kernel_size=3"), formula(3, 3, own=True))


def test_finds_the_key_that_the_window_asks_for():
    q, k, v = sequences(1, 4, 64)
    k[:, :, 20], q[:, :, -8:] = 6.0, 3.0
    _, kept, _ = drive(parse("snapkv:budget=16,window_size=8"), q, k, v, [64])
    assert all({20, *range(56, 64)} <= set(head) for head in kept[0][0].tolist())


@pytest.mark.parametrize("fields", ["window_size=0", "kernel_size=4", "kernel_size=0", "budget=31"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"snapkv:{fields}")


def test_a_window_longer_than_the_prompt_keeps_it_whole():
    q, k, v = sequences(1, 4, 8)
    _, kept, _ = drive(parse("snapkv:budget=40"), q, k, v, [8])
    assert kept[0].tolist() == [[list(range(8))] * 2]
