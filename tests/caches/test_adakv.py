# SPDX-License-Identifier: Apache-2.0
"""AdaKV: budgets of heads from where the best scores of the layer are, stored ragged."""

import pytest
import torch

from caches.formula import sequences
from caches.rows import agrees, drive
from caches.test_snapkv import formula as votes
from manyheads import UserError, parse
from tolerance import CLOSE, is_close


def formula(window, kernel):
    score = votes(window, kernel)
    return lambda row, h: score(row.held[h], row.k[h], row.q[h * row.groups : (h + 1) * row.groups], row.seen)


def norms(row, h):
    return [-float(row.k[h, s].norm()) for s in row.held[h]]


def count_best(scores, total, heads):
    """How many of the ``total`` best ``(score, ...)`` pairs lie in each head."""
    best = sorted(scores, reverse=True)[:total]
    return [sum(h == head for _, h, _ in best) for head in range(heads)]


def share(alpha, protects):
    """Budgets by head: floor ``alpha`` of the equal budget, the rest by the best scores, what is over to the next."""

    def rooms(row, scores, room):
        heads = len(scores)
        kept = [sum(protects(s, row.seen) for s in mine) for mine in row.held]
        free = [
            sorted(
                ((x, h, s) for s, x in zip(row.held[h], scores[h], strict=True) if not protects(s, row.seen)),
                reverse=True,
            )
            for h in range(heads)
        ]
        equal = [max(0, room - n) for n in kept]
        star = count_best([x for mine in free for x in mine], sum(equal), heads)
        sure = [
            min(len(mine), int(alpha * b + (1 - alpha) * s + 1e-9))
            for mine, b, s in zip(free, equal, star, strict=True)
        ]
        more = count_best(
            [x for mine, n in zip(free, sure, strict=True) for x in mine[n:]], sum(equal) - sum(sure), heads
        )
        return [n + a + b for n, a, b in zip(kept, sure, more, strict=True)]

    return rooms


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (2, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "alpha", "schedule"),
    [
        (6, 0.2, "prefill"),
        (0.6, 0.2, "prefill"),
        (6, 0.5, "step"),
        (0.7, 0.0, 3),
        (5, 1.0, "chunk"),
        (0.5, 0.3, "step"),
    ],
)
def test_against_loops(budget, alpha, schedule, heads, padding):
    base = "snapkv(window_size=2,kernel_size=3)"
    policy = parse(f"adakv:base={base},budget={budget},alpha={alpha},schedule={schedule}")
    rooms = share(alpha, lambda s, seen: s >= seen - 2)
    agrees(policy, formula(2, 3), heads, padding, rooms=rooms, fixed=lambda s, seen, room: s >= seen - 2)


@pytest.mark.parametrize("padding", [(0, 0), (0, 5)])
@pytest.mark.parametrize(("budget", "schedule"), [(5, "prefill"), (0.5, "step"), (6, 3)])
def test_around_another_base(budget, schedule, padding):
    policy = parse(f"adakv:base=knorm,budget={budget},schedule={schedule},sinks=1")
    agrees(policy, norms, 4, padding, rooms=share(0.2, lambda s, seen: s < 1))


@pytest.mark.parametrize("schedule", ["prefill", "step", "chunk", 3])
def test_around_attention_mass(schedule):
    """What the base remembers of each slot outlives ragged storage."""
    policy = parse(f"adakv:base=h2o(recent_share=0),budget=6,alpha=0.1,schedule={schedule}")
    mass = lambda row, h: [row.mass[h][s] for s in row.held[h]]  # noqa: E731
    agrees(policy, mass, 4, (0, 3), rooms=share(0.1, lambda s, seen: False))


def test_control_of_the_loops():
    policy = parse("adakv:base=knorm,budget=5,alpha=0.2")
    agrees(policy, norms, rooms=share(0.2, lambda s, seen: False))
    for wrong in (None, share(1.0, lambda s, seen: False), share(0.2, lambda s, seen: s < 3)):
        with pytest.raises(AssertionError):
            agrees(policy, norms, rooms=wrong)


def _kept(spec, sizes, seed=4, batch=2, heads=4):
    q, k, v = sequences(batch, heads, sum(sizes), seed=seed)
    k[:, 0] *= torch.linspace(0.2, 3, k.shape[2])[:, None]  # unequal heads
    return drive(parse(spec), q, k, v, sizes)


@pytest.mark.parametrize("base", ["snapkv(window_size=3,kernel_size=3)", "knorm", "h2o", "keydiff", "tova"])
@pytest.mark.parametrize("schedule", ["prefill", "step", 3])
def test_alpha_1_is_the_base(base, schedule):
    slug, _, rest = base.partition("(")
    sizes = [24, *[1] * 8]
    plain = f"{slug}:budget=9,schedule={schedule}" + (f",{rest.rstrip(')')}" if rest else "")
    got, kept, _ = _kept(f"adakv:base={base},budget=9,alpha=1,schedule={schedule}", sizes)
    want, held, _ = _kept(plain, sizes)
    assert is_close(got, want, CLOSE)
    for a, b in zip(kept, held, strict=True):
        assert [sorted(p for p in h if p >= 0) for row in a.tolist() for h in row] == [
            sorted(p for p in h if p >= 0) for row in b.tolist() for h in row
        ]


@pytest.mark.parametrize("base", ["snapkv(window_size=3,kernel_size=3)", "knorm", "h2o", "keydiff", "tova", "random"])
@pytest.mark.parametrize("budget", [8, 0.4])
def test_the_total_is_exact_after_every_step(base, budget):
    """Also when a head has dropped too much before to fill its budget again."""
    _, kept, _ = _kept(f"adakv:base={base},budget={budget},schedule=step", [24, *[1] * 8])
    for n, held in enumerate(kept, 24):
        room = budget if isinstance(budget, int) else -int(-budget * n // 1)
        assert (held >= 0).sum((1, 2)).tolist() == [2 * room] * 2


def test_heads_keep_at_least_their_floor():
    q, k, v = sequences(2, 4, 40, seed=4)
    k[:, 0] *= 0.01
    for alpha, least in ((0.3, 2), (0.5, 4), (0.0, 0)):
        _, kept, _ = drive(parse(f"adakv:base=knorm,budget=10,alpha={alpha},sinks=2"), q, k, v, [40])
        assert (kept[0] >= 0).sum(-1).tolist() == [[18 - least, 2 + least]] * 2


def test_without_a_floor_the_best_of_the_layer_stay():
    q, k, v = sequences(1, 4, 40, seed=4)
    k[:, 0] *= 0.5
    _, kept, _ = drive(parse("adakv:base=knorm,budget=10,alpha=0"), q, k, v, [40])
    best = (-k[0].norm(dim=-1)).flatten().topk(20).indices.tolist()
    assert sorted(40 * h + s for h in (0, 1) for s in kept[0][0, h].tolist() if s >= 0) == sorted(best)


def test_equal_heads_share_equally():
    q, k, v = sequences(1, 4, 40, seed=4)
    k[:, 1] = k[:, 0]
    _, kept, _ = drive(parse("adakv:base=knorm,budget=10"), q, k, v, [40])
    assert kept[0].shape[2] == 10 and torch.equal(kept[0][:, 0], kept[0][:, 1])
    k[:] = 1.0
    _, kept, _ = drive(parse("adakv:base=knorm,budget=10"), q, k, v, [40])
    assert kept[0].tolist() == [[list(range(30, 40))] * 2]


def test_unequal_heads_cost_no_empty_slots():
    """Ragged storage: what is held grows with the total, not with the largest head."""
    q, k, v = sequences(1, 4, 400, seed=4)
    k[:, 0] *= 0.01
    _, kept, even = drive(parse("knorm:budget=100"), q, k, v, [400])
    _, own, ragged = drive(parse("adakv:base=knorm,budget=100,alpha=0"), q, k, v, [400])
    assert (own[0] >= 0).sum(-1).tolist() == [[200, 0]] and (kept[0] >= 0).sum(-1).tolist() == [[100, 100]]
    assert ragged.nbytes() < 1.3 * even.nbytes()


def test_spec_reads_back():
    policy = parse("adakv:base=snapkv(window_size=16),budget=0.25,alpha=0.5")
    assert parse(policy.spec) == policy and policy.window == 16


@pytest.mark.parametrize(
    "fields", ["alpha=1.1", "alpha=-1", "budget=31", "base=full", "base=hashevict", "base=knorm(budget=3)"]
)
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"adakv:{fields}")
