# SPDX-License-Identifier: Apache-2.0
"""Finch: what the question attends to, weighed by what its queries see, the same part of every chunk."""

import math

import pytest

from caches.formula import DIM, agrees, drive, sequences
from manyheads import UserError, parse


def formula(window, chunk=0, *, normalize=True, by_chunk=True):
    """The score of each held token, from the definition; a chunk's tokens by their place in it."""

    def score(held, k, q, seen):
        votes = dict.fromkeys(held, 0.0)
        for head in q:
            for t in range(max(0, seen - window), seen):
                e = {s: math.exp(float(head[t] @ k[s]) / math.sqrt(DIM)) for s in held if s <= t}
                for s in e:
                    votes[s] += e[s] / sum(e.values()) * (t if normalize else 1.0)
        if not chunk or not by_chunk:
            return [votes[s] for s in held]
        parts = {}
        for s in held:
            parts.setdefault(s // chunk if s < seen - window else -1, []).append(s)
        place = {}
        for part in parts.values():
            for i, s in enumerate(sorted(part, key=lambda s: (votes[s], s), reverse=True)):
                place[s] = -(i + 0.5) / len(part)
        return [place[s] for s in held]

    return score


@pytest.mark.parametrize("padding", [(0, 0), (2, 5)])
@pytest.mark.parametrize(
    ("budget", "window", "chunk", "schedule", "heads"),
    [
        (6, 3, 0, "prefill", 8),
        (0.8, 2, 3, "prefill", 4),
        (7, 4, 4, "step", 2),
        (0.7, 2, 2, 3, 4),
        (5, 1, 5, "chunk", 8),
    ],
)
def test_against_loops(budget, window, chunk, schedule, heads, padding):
    policy = parse(f"finch:budget={budget},window_size={window},chunk_size={chunk},schedule={schedule}")
    agrees(policy, formula(window, chunk), heads, padding)


def test_control_of_the_loops():
    policy = parse("finch:budget=6,window_size=3,chunk_size=3,schedule=step")
    agrees(policy, formula(3, 3))
    for wrong in (formula(3, 3, by_chunk=False), formula(3, 5), formula(2, 3)):
        with pytest.raises(AssertionError):
            agrees(policy, wrong)
    policy = parse("finch:budget=7,window_size=6,chunk_size=0,schedule=step")
    agrees(policy, formula(6))
    with pytest.raises(AssertionError):
        agrees(policy, formula(6, normalize=False))


def test_every_chunk_keeps_its_part():
    q, k, v = sequences(1, 4, 64)
    k[:, :, 20:28], q[:, :, -8:] = 3.0, 3.0  # all that is asked for stands in the second chunk
    for chunk in (0, 16):
        _, kept, _ = drive(parse(f"finch:budget=24,window_size=8,chunk_size={chunk}"), q, k, v, [64])
        for head in kept[0][0].tolist():
            inside = [s for s in head if 16 <= s < 32]
            assert len(inside) in (4, 5) if chunk else set(range(20, 28)) <= set(inside)


@pytest.mark.parametrize("fields", ["window_size=0", "chunk_size=-1", "budget=31"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"finch:{fields}")
