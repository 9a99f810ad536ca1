# SPDX-License-Identifier: Apache-2.0
"""A budget means the same everywhere: a fraction of the tokens seen, or slots."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads import UserError
from manyheads.attention.budget import as_budget, keep_counts, keep_limit


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        (" .25 ", 0.25),
        (1.0, 1.0),
        ("1.0", 1.0),
        (1, 1),
        ("1", 1),
        ("64", 64),
        (64, 64),
        ("1e-1", 0.1),
    ],
)
def test_reads(given_, meant):
    budget = as_budget(given_)
    assert budget == meant and type(budget) is type(meant)


@pytest.mark.parametrize(
    "given_",
    [
        0,
        0.0,
        "0",
        -1,
        "-3",
        -0.5,
        1.5,
        "2.0",
        "nan",
        "inf",
        float("nan"),
        "half",
        "",
        "0,5",
        None,
        True,
        [1],
        "0x10",
        "1_0.5.1",
    ],
)
def test_refuses(given_):
    with pytest.raises(UserError) as refusal:
        as_budget(given_)
    assert "\n" not in str(refusal.value)


def test_rounding_is_up_and_exact():
    """ceil(0.1 * 30) is 3, whatever binary fractions make of it."""
    assert keep_limit(0.1, 30) == 3 and keep_limit(0.1, 31) == 4 and keep_limit(1.0, 7) == 7
    assert keep_limit(0.001, 5) == 1 and keep_limit(64, 10) == 10 and keep_limit(64, 100) == 64


@given(percent=st.integers(1, 100), counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=8))
def test_fraction_is_the_ceiling(percent, counts):
    """Against exact rational arithmetic; rows and their longest agree."""
    want = [-((-Fraction(percent, 100) * n) // 1) for n in counts]
    assert keep_counts(percent / 100, torch.tensor(counts)).tolist() == want
    assert [keep_limit(percent / 100, n) for n in counts] == want
    assert keep_limit(percent / 100, max(counts)) == max(want)


@given(slots=st.integers(1, 200), counts=st.lists(st.integers(0, 400), min_size=1, max_size=8))
def test_slots(slots, counts):
    assert keep_counts(slots, torch.tensor(counts)).tolist() == [min(slots, n) for n in counts]
