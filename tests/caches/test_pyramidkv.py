# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: budgets of layers on a straight line around the equal budget, under the scores of another strategy."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caches.formula import sequences, site
from caches.rows import agrees, drive
from caches.test_snapkv import formula as votes
from manyheads import UserError, parse
from manyheads.caches._view import CacheView
from tolerance import CLOSE, is_close


def layer(index, layers):
    return dataclasses.replace(site(layer=index), peers=tuple(range(layers)))


def line(index, layers, mean, beta, most):
    """Unprotected slots of a layer: on the line from 2 mean - mean/beta down to mean/beta, rounded towards the mean."""
    bottom = min(2 * mean - mean // beta, most)
    top = 2 * mean - bottom
    exact = bottom - (bottom - top) * index / (layers - 1)
    return math.floor(exact + 1e-9) if exact > mean else math.ceil(exact - 1e-9)


def formula(window, kernel):
    score = votes(window, kernel)
    return lambda row, h: score(row.held[h], row.k[h], row.q[h * row.groups : (h + 1) * row.groups], row.seen)


@pytest.mark.parametrize("padding", [(0, 0), (0, 3), (2, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "beta", "schedule"), [(7, 20, "prefill"), (0.5, 3, "prefill"), (6, 2, "step"), (0.7, 20, 3)]
)
@pytest.mark.parametrize("index", [0, 2])
def test_against_loops(index, budget, beta, schedule, heads, padding):
    base = "snapkv(window_size=2,kernel_size=3)"
    policy = parse(f"pyramidkv:base={base},budget={budget},beta={beta},schedule={schedule}")

    def rooms(row, scores, room):
        return [2 + line(index, 4, room - 2, beta, row.seen - 2)] * len(scores)

    fixed = lambda s, seen, room: s >= seen - 2  # noqa: E731
    agrees(policy, formula(2, 3), heads, padding, rooms=rooms, fixed=fixed, at=layer(index, 4))


def test_control_of_the_loops():
    policy = parse("pyramidkv:base=snapkv(window_size=2,kernel_size=3),budget=5,beta=4")
    at, fixed = layer(0, 4), lambda s, seen, room: s >= seen - 2
    agrees(
        policy, formula(2, 3), rooms=lambda r, s, room: [2 + line(0, 4, room - 2, 4, r.seen)] * 2, fixed=fixed, at=at
    )
    with pytest.raises(AssertionError):
        agrees(policy, formula(2, 3), fixed=fixed, at=at)  # equal budgets
    with pytest.raises(AssertionError):
        agrees(policy, formula(2, 3), rooms=lambda r, s, room: [line(0, 4, room, 4, r.seen)] * 2, fixed=fixed, at=at)


def budgets(policy, layers, counts, equal):
    """What every layer allocates, ``[layers, B]``; heads must agree."""
    view = {"positions": torch.zeros(len(counts), 2, 1, dtype=torch.long), "counts": torch.tensor(counts)}
    rows = []
    for index in range(layers):
        k = torch.zeros(len(counts), 2, 1, 4)
        seen = CacheView(k, k, queries=None, scale=1.0, softcap=None, sinks=None, site=layer(index, layers), **view)
        made = policy.head_budgets(seen, k[..., 0], torch.tensor(equal)[:, None].expand(-1, 2))
        assert torch.equal(made[:, 0], made[:, 1]) and made.dtype == torch.int64
        rows.append(made[:, 0])
    return torch.stack(rows)


@given(st.integers(2, 40), st.integers(32, 5000), st.floats(0.01, 1.0), st.floats(1, 50))
def test_layers_share_exactly_what_there_is(layers, count, part, beta):
    policy = parse(f"pyramidkv:base=snapkv,beta={beta}")
    equal = max(32, math.ceil(part * count))
    if equal > count:
        return
    made = budgets(policy, layers, [count, count], [equal, equal])[:, 0]
    assert int(made.sum()) == layers * equal
    assert bool((made.diff() <= 0).all()) and int(made[-1]) >= 32 and int(made[0]) <= count
    mean = equal - 32
    assert int(made[-1]) - 32 == max(int(mean // beta), 2 * mean - (count - 32))


def test_the_numbers_of_the_released_code_at_both_ends():
    """32 layers, 2,048 slots of which 64 are the window, beta 20: 99 + 64 at the top, 3,869 + 64 at the bottom."""
    made = budgets(parse("pyramidkv:base=snapkv(window_size=64),budget=2048"), 32, [100_000], [2048])[:, 0].tolist()
    assert (made[0], made[-1]) == (3869 + 64, 99 + 64)
    assert all(abs(a - b - 3770 / 31) < 2 for a, b in pairwise(made))


def test_a_short_text_flattens_the_line():
    made = budgets(parse("pyramidkv:base=snapkv(window_size=10),budget=60"), 5, [80], [60])[:, 0]
    assert made.tolist() == [80, 70, 60, 50, 40]


def test_rows_of_unequal_length_have_lines_of_their_own():
    policy = parse("pyramidkv:base=snapkv(window_size=4),budget=0.5,beta=5")
    together = budgets(policy, 4, [100, 30, 6], [50, 15, 4])
    for b, (count, equal) in enumerate(((100, 50), (30, 15), (6, 4))):
        assert torch.equal(together[:, b], budgets(policy, 4, [count], [equal])[:, 0])


@pytest.mark.parametrize("base", ["snapkv(window_size=3,kernel_size=3)", "knorm", "h2o", "random"])
def test_beta_1_is_the_base(base):
    q, k, v = sequences(2, 4, 30, seed=4)
    wrapped, plain = (parse(f"{spec},budget=9") for spec in (f"pyramidkv:base={base},beta=1", f"{_colon(base)}"))
    for index in (0, 2):
        got, kept, _ = drive(wrapped, q, k, v, [20, *[1] * 10], at=layer(index, 3))
        want, held, _ = drive(plain, q, k, v, [20, *[1] * 10], at=layer(index, 3))
        assert is_close(got, want, CLOSE)
        for a, b in zip(kept, held, strict=True):
            assert [sorted(h) for row in a.tolist() for h in row] == [sorted(h) for row in b.tolist() for h in row]


def _colon(base):
    slug, _, rest = base.partition("(")
    return f"{slug}:{rest.rstrip(')')}" if rest else f"{slug}:sinks=0"


def test_one_layer_or_a_layer_apart_is_the_base():
    q, k, v = sequences(1, 4, 20, seed=4)
    policy = parse("pyramidkv:base=knorm,budget=6")
    for at in (layer(0, 1), site()):
        _, kept, _ = drive(policy, q, k, v, [20], at=at)
        assert (kept[0] >= 0).sum(-1).tolist() == [[6, 6]]


def test_the_line_is_that_of_the_layers_it_acts_on():
    q, k, v = sequences(1, 4, 30, seed=4)
    policy = parse("pyramidkv:base=knorm,budget=10,beta=5,layers=2+4+6")
    kept = [drive(policy, q, k, v, [30], at=layer(index, 8))[1][0] for index in (2, 4, 6)]
    assert [int((held >= 0).sum(-1)[0, 0]) for held in kept] == [18, 10, 2]


def test_no_layer_is_left_empty():
    made = budgets(parse("pyramidkv:base=knorm,budget=0.5,beta=20"), 4, [40, 4, 1], [20, 2, 1])
    assert made.tolist() == [[39, 3, 1], [26, 2, 1], [14, 2, 1], [1, 1, 1]]


def test_around_budgets_of_heads():
    """The layer's budget goes to the base, which shares it among heads."""
    q, k, v = sequences(1, 4, 30, seed=4)
    policy = parse("pyramidkv:base=adakv(base=knorm,alpha=0),budget=10,beta=5")
    sizes = [(drive(policy, q, k, v, [30], at=layer(index, 3))[1][0] >= 0).sum(-1)[0] for index in range(3)]
    assert [int(x.sum()) for x in sizes] == [36, 20, 4] and any(int(x[0]) != int(x[1]) for x in sizes)


def test_spec_reads_back():
    policy = parse("pyramidkv:base=snapkv(window_size=16,kernel_size=5),budget=0.25,beta=10")
    assert parse(policy.spec) == policy and policy.window == 16 and policy.protected == 16


@pytest.mark.parametrize(
    "fields", ["beta=0.5", "beta=nan", "budget=31", "base=full", "base=hashevict", "base=snapkv(budget=0.3)", "base=no"]
)
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"pyramidkv:{fields}")
