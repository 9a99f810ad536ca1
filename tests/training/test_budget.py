# SPDX-License-Identifier: Apache-2.0
"""Budgets as they are typed."""

import pytest

from manyheads.errors import UserError
from manyheads.training import Budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("10m", 600, "seconds"), ("1.5h", 5400, "seconds"), ("90s", 90, "seconds"), ("2 min", 120, "seconds"),
        ("2M", 2_000_000, "tokens"), ("1.5k", 1500, "tokens"), ("70", 70, "tokens"), ("2M tokens", 2_000_000, "tokens"),
        ("700 steps", 700, "steps"), ("1 step", 1, "steps"),
    ],
)  # fmt: skip
def test_what_is_meant(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit) == Budget.of(text)


@pytest.mark.parametrize("text", ["lots", "", "-1M", "10m tokens", "0", "1.5 steps", "3 parsecs", "1e400", "10MM"])
def test_what_means_nothing_is_refused(text):
    with pytest.raises(UserError, match=r"budget|steps are whole"):
        Budget.parse(text)


def test_a_number_is_steps_and_case_tells_minutes_from_millions():
    assert Budget.of(7) == Budget(7, "steps")
    assert Budget.parse("3m") != Budget.parse("3M")
