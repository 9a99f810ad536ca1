# SPDX-License-Identifier: Apache-2.0
"""TOVA: the weight that the last query gives, averaged over all heads of the layer; heads keep the same tokens."""

import pytest
import torch

from caches.formula import DIM, sequences
from caches.rows import agrees, drive
from manyheads import UserError, parse
from manyheads.call import AttentionCall


def formula(row, h):
    every = [row.weights(head, row.seen - 1, row.held[h]) for head in range(row.q.shape[0])]
    return (sum(every) / len(every)).tolist()


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (2, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "schedule"), [(6, "step"), (0.6, "step"), (0.5, "prefill"), (5, "chunk"), (0.7, 3), (1, "step")]
)
def test_against_loops(budget, schedule, heads, padding):
    agrees(parse(f"tova:budget={budget},schedule={schedule}"), formula, heads, padding)


def test_control_of_the_loops():
    agrees(parse("tova:budget=6"), formula)
    with pytest.raises(AssertionError):  # each head for itself
        agrees(parse("tova:budget=6"), lambda row, h: row.weights(2 * h, row.seen - 1, row.held[h]).tolist())


def test_protected_tokens_stay():
    agrees(parse("tova:budget=6,sinks=2,recent=1"), formula)


def test_every_head_drops_the_same_token():
    q, k, v = sequences(2, 8, 30, seed=5)
    _, kept, _ = drive(parse("tova:budget=7"), q, k, v, [24, *[1] * 6])
    assert all(torch.equal(held[:, 0], held[:, 1]) for held in kept)


def test_heads_agree_whatever_the_order_of_their_slots():
    q, k, v = sequences(1, 4, 30, seed=6)
    policy = parse("tova:budget=9")
    _, _, store = drive(policy, q, k, v, [28])
    _, _, other = drive(policy, q, k, v, [28])
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(h)) for h in range(2)])[None]
    other.padded.keep(order, torch.ones_like(order, dtype=torch.bool))
    assert not torch.equal(other.padded.positions()[:, 0], other.padded.positions()[:, 1])
    for t in (28, 29):
        for one in (store, other):
            keys, values = one.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
            call = AttentionCall(one.site, q[:, :, t : t + 1], keys, values, DIM**-0.5)
            one.evict(one.mask(call))
        got, want = (one.padded.positions().sort(-1).values for one in (other, store))
        assert torch.equal(got, want) and torch.equal(got[:, 0], got[:, 1])


def test_uniform_attention_is_a_window():
    """Equal weights, equal scores: of equals the newer stays."""
    q, k, v = sequences(1, 4, 20)
    _, kept, _ = drive(parse("tova:budget=8"), torch.zeros_like(q), k, v, [18, 1, 1])
    assert [sorted(held[0, 0].tolist()) for held in kept] == [list(range(n - 8, n)) for n in (18, 19, 20)]


def test_the_newest_token_is_not_spared():
    q, k, v = sequences(1, 4, 12)
    q[:], k[:] = 1.0, 0.5
    k[:, :, -1] = -9.0
    _, kept, _ = drive(parse("tova:budget=11"), q, k, v, [12])
    assert kept[0].tolist() == [[list(range(11))] * 2]


@pytest.mark.parametrize("fields", ["budget=2,sinks=3", "schedule=0", "window=2"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"tova:{fields}")
