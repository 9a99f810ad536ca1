# SPDX-License-Identifier: Apache-2.0
"""Full: everything is kept."""

import pytest

from caches.formula import agrees, drive, sequences
from manyheads import UserError, parse


@pytest.mark.parametrize("padding", [(0, 0), (0, 4)])
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_against_loops(heads, padding):
    agrees(parse("full"), lambda held, *_: [0.0] * len(held), heads, padding)


def test_keeps_everything_in_order_without_bookkeeping():
    q, k, v = sequences(1, 4, 9)
    _, kept, store = drive(parse("full"), q, k, v, [9])
    assert store.nbytes() == 2 * k.numel() * 4
    _, kept, store = drive(parse("full"), q, k, v, [5, 1, 3])
    assert kept[-1].tolist() == [[list(range(9))] * 2]
    assert store.nbytes() <= 2 * 4 * (k.numel() // 9) * (9 + 17)  # with the room for tokens to come
    assert store.keys.equal(k) and store.values.equal(v)


@pytest.mark.parametrize("budget", [0.5, 1, 64])
def test_takes_no_other_budget(budget):
    with pytest.raises(UserError, match="full keeps every token"):
        parse(f"full:budget={budget}")
