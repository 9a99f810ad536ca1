# SPDX-License-Identifier: Apache-2.0
"""Random: a uniform draw of positions that depends on nothing else in the batch."""

import pytest
import torch

from caches.formula import drive, sequences
from manyheads import parse
from manyheads.caches.random import _mix
from tolerance import DRAWN, WRONG


def kept(spec, length=200, batch=1, seed=0):
    q, k, v = sequences(batch, 4, length, seed)
    return drive(parse(spec), q, k, v, [length])[1][0]


@pytest.mark.parametrize("budget", [0.1, 0.5, 17])
def test_keeps_the_budget_and_the_protected(budget):
    positions = kept(f"random:budget={budget},sinks=2,recent=3")
    count = budget if isinstance(budget, int) else int(budget * 200)
    assert positions.shape == (1, 2, count)
    for head in positions[0].tolist():
        assert sorted(set(head)) == head and {0, 1, 197, 198, 199} <= set(head) <= set(range(200))


def test_draws_depend_on_seed_head_and_layer_alone():
    base = kept("random:budget=0.5")
    assert torch.equal(kept("random:budget=0.5", seed=9), base)  # other tensors, same draw
    assert torch.equal(kept("random:budget=0.5", batch=3)[2], base[0])
    assert not torch.equal(kept("random:budget=0.5,seed=1"), base)
    assert base[0, 0].tolist() != base[0, 1].tolist()


def test_smaller_budgets_keep_subsets():
    """One draw orders all tokens: whatever survives a small budget survives a larger one."""
    small, large = kept("random:budget=0.2")[0], kept("random:budget=0.6")[0]
    assert all(set(s) < set(x) for s, x in zip(small.tolist(), large.tolist(), strict=True))


def test_every_position_is_as_likely():
    """Counts over 400 seeds are binomial, one by one and together; the last tokens a sixth likelier are found out."""
    n, seeds = 50, 400
    counts = torch.zeros(n)
    for seed in range(seeds):
        counts[kept(f"random:budget=0.5,seed={seed}", length=n)[0, 0]] += 1
    spread = (seeds * 0.25) ** 0.5
    assert float((counts - seeds / 2).abs().max()) < 4.5 * spread  # of 50
    expected = spread * n**0.5  # of the distance of all counts together
    assert expected / DRAWN < float((counts - seeds / 2).norm()) < DRAWN * expected
    sloped = counts + seeds / 2 * torch.linspace(-0.3, 0.3, n)
    assert float((sloped - seeds / 2).norm()) > WRONG / DRAWN * float((counts - seeds / 2).norm())


def test_the_mixer_is_that_of_splitmix64_but_for_one_shift():
    """Steele, Lea and Flood's finaliser on 64 bits without a sign, in Python's integers; bits are spread evenly."""
    whole = 1 << 64

    def mixed(x, second=30):
        x = x % whole
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % whole
        x = (x ^ (x >> second)) * 0x94D049BB133111EB % whole
        x ^= x >> 31
        return x - whole if x >= whole // 2 else x

    given = [0, 1, -1, 12345, -98765, 2**62, -(2**63), 2**63 - 1, 0x9E3779B97F4A7C15 - whole]
    assert _mix(torch.tensor(given)).tolist() == [mixed(x) for x in given]
    assert mixed(0x9E3779B97F4A7C15, 27) % whole == 0xE220A8397B1DCDAF  # the first number of seed 0, as published
    bits = torch.stack([(_mix(torch.arange(2000)) >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert float((bits - 0.5).norm()) < DRAWN * (64 * 0.25 / 2000) ** 0.5
