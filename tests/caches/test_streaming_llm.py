# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: the first tokens and the last, after every step."""

import pytest

from caches.formula import agrees, drive, sequences
from manyheads import UserError, parse


@pytest.mark.parametrize("padding", [(0, 0), (0, 3)])
@pytest.mark.parametrize(("budget", "sinks"), [(6, 2), (5, 0), (0.5, 4), (1, 1), (3, 3)])
def test_against_loops(budget, sinks, padding):
    agrees(
        parse(f"streaming_llm:budget={budget},sinks={sinks}"),
        lambda held, *_: [float(s) for s in held],
        padding=padding,
    )


def test_what_is_held():
    q, k, v = sequences(1, 4, 20)
    _, kept, _ = drive(parse("streaming_llm:budget=7"), q, k, v, [10] + [1] * 10)
    for seen, positions in enumerate(kept, start=10):
        assert positions.tolist() == [[[0, 1, 2, 3, seen - 3, seen - 2, seen - 1]] * 2]


def test_sinks_need_room():
    with pytest.raises(UserError, match="a budget of 3 slots cannot hold its 4 protected"):
        parse("streaming_llm:budget=3")
