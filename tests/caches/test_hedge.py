# SPDX-License-Identifier: Apache-2.0
"""Hedge: distinct keys and what the last queries would look up again, ranked over all layers, stored in 4 bits."""

import dataclasses
import math

import pytest
import torch

import manyheads
from caches.formula import DIM, site
from manyheads import UserError
from manyheads.attention.padded import PaddedCache
from manyheads.caches._evict import keep_best
from manyheads.caches._view import CacheView, QueryWindow
from manyheads.caches.hedge import Hedge
from manyheads.integrations.transformers import new_cache
from oracles import caches, models
from tolerance import SAME, assert_close

ANGLES = [100.0 ** (-2 * i / DIM) for i in range(DIM // 2)]
NEAR = 32


def rotation(position):
    """The rotation of one position as a matrix: pairs (i, i + d/2)."""
    r = torch.zeros(DIM, DIM, dtype=torch.float64)
    for i, angle in enumerate(ANGLES):
        j, a = i + DIM // 2, position * angle
        r[i, i] = r[j, j] = math.cos(a)
        r[j, i], r[i, j] = math.sin(a), -math.sin(a)
    return r


def tables(places):
    """Cosines and sines ``[B, T, d]`` as a model passes them on, at ``places [B, T]``."""
    a = places.clamp(min=0)[..., None].double() * torch.tensor(ANGLES * 2, dtype=torch.float64)
    return a.cos().float(), a.sin().float()


def contents(layers=2, heads=4, length=40, seed=0):
    """Queries ``[H, T, d]``, keys and values ``[2, T, d]`` of each layer, before any rotation; keys have a mean."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, length, DIM, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(2 * draw(heads), draw(2) + 0.7 * (layer + 1), draw(2)) for layer in range(layers)]


def seen_by(policy, rows, layer, *, rotary=True, shift=0, window=None, dtype=torch.float32):
    """The view of one layer over ``rows``, each (q, k, v) of its own length, padded on the left."""
    width = max(row[0].shape[1] for row in rows)
    places = torch.stack([torch.arange(width) - (width - row[0].shape[1]) for row in rows])

    def padded(index):
        out = torch.full((len(rows), rows[0][index].shape[0], width, DIM), 7.0, dtype=torch.float64)
        for b, row in enumerate(rows):
            for t in range(row[0].shape[1]):
                turn = rotation(t + shift) if rotary and index < 2 else torch.eye(DIM, dtype=torch.float64)
                out[b, :, width - row[0].shape[1] + t] = row[index][:, t] @ turn.T
        return out.to(dtype)

    q, k, v = (padded(index) for index in range(3))
    places = places.where(places >= 0, -1)
    queries = QueryWindow(q, places).last(policy.window)
    return CacheView(
        k, v, places[:, None].expand(-1, 2, -1), (places >= 0).sum(1), queries, DIM**-0.5, None, None,
        dataclasses.replace(site(window=window, layer=layer), peers=(0, 1)),
        rotary=tables(places + shift) if rotary else None,
    )  # fmt: skip


def kept(policy, views):
    """Positions that stay, by row, layer and head."""
    shares = policy.layer_budgets({view.site.layer: view for view in views})
    held = []
    for view in views:
        slots = PaddedCache.empty(view.k, view.v)
        slots.update(view.k, view.v)
        slots.mark(view.positions[:, 0] >= 0)
        counts = torch.ceil(view.counts * policy.budget - 1e-9).long()
        keep_best(policy, view, slots, counts, int(counts.max()), shares[view.site.layer])
        assert "ranking" not in view.state
        held.append([[sorted(p for p in head if p >= 0) for head in row] for row in slots.positions().tolist()])
    return [[layer[b] for layer in held] for b in range(len(views[0].counts))]


def by_hand(policy, layers, *, turned=True, again=True, near=True, square=True, values=True, joint=True):
    """The same for one row in loops, from contents; the flags leave out one part each."""
    scores, length = {}, layers[0][0].shape[1]
    turns = [rotation(t) for t in range(length + 1)]
    for layer, (q, k, v) in enumerate(layers):
        groups = q.shape[0] // 2
        for h in range(2):
            keys = [k[h, j] if turned else turns[j] @ k[h, j] for j in range(length)]
            mean = sum(x / x.norm() for x in keys)
            used = [0.0] * length
            asked = range(max(0, length - policy.window_size), length)
            for g in range(h * groups, (h + 1) * groups):
                for t in asked:
                    new = turns[length if again else t] @ q[g, t]
                    z = [math.exp(float(new @ (turns[j] @ k[h, j])) / math.sqrt(DIM)) for j in range(length)]
                    own = turns[t] @ q[g, t]
                    beside = [
                        math.exp(float(own @ (turns[j] @ k[h, j])) / math.sqrt(DIM))
                        for j in range(max(0, t - NEAR + 1), t + 1)
                    ]
                    total = sum(z) + (sum(beside) if near else 0.0)
                    for j in range(length):
                        used[j] += (z[j] / total) ** (2 if square else 1) / len(asked) / groups
            for j in range(length):
                distinct = -float(keys[j] @ mean) / float(keys[j].norm() * mean.norm())
                use = (math.sqrt(used[j]) if square else used[j]) * (float(v[h, j].norm()) if values else 1.0)
                scores[layer, h, j] = (distinct, use)
    pools = [list(scores)] if joint else [[s for s in scores if s[0] == n] for n in range(len(layers))]
    held = [[[], []] for _ in layers]
    for pool in pools:
        first, second = ({s: i + 1 for i, s in enumerate(sorted(pool, key=lambda s: -scores[s][n]))} for n in (0, 1))
        rank = {s: min(first[s] / policy.distinct, second[s] / (1 - policy.distinct)) for s in pool}
        spared = {s: s[2] < policy.sinks or s[2] >= length - policy.recent for s in pool}
        room = math.ceil(policy.budget * length - 1e-9) * len({s[:2] for s in pool})
        for layer, h, j in sorted(pool, key=lambda s: (not spared[s], rank[s]))[:room]:
            held[layer][h].append(j)
    return [[sorted(head) for head in layer] for layer in held]


TOKENS = {"bits": "none", "whole": 0, "sinks": 1, "recent": 2, "window_size": 8}


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "fields", [{}, {"budget": 0.2}, {"distinct": 0.7, "sinks": 0}, {"window_size": 100, "recent": 0}], ids=str
)
def test_against_loops(fields, heads):
    policy, layers = Hedge(**{**TOKENS, "budget": 0.4, **fields}), contents(heads=heads)
    got = kept(policy, [seen_by(policy, [row], layer) for layer, row in enumerate(layers)])
    assert got == [by_hand(policy, layers)]


def test_control_of_the_loops():
    """Each part of the definition matters for what stays."""
    policy, layers = Hedge(**TOKENS, budget=0.3), contents()
    got = kept(policy, [seen_by(policy, [row], layer) for layer, row in enumerate(layers)])
    assert got == [by_hand(policy, layers)]
    for part in ("turned", "again", "near", "square", "values", "joint"):
        assert got != [by_hand(policy, layers, **{part: False})], part


def test_rows_of_unequal_length_are_ranked_by_themselves():
    policy, rows = Hedge(**TOKENS, budget=0.4), [contents(length=n, seed=n) for n in (40, 9, 25)]
    together = kept(policy, [seen_by(policy, [row[n] for row in rows], n) for n in (0, 1)])
    assert together == [by_hand(policy, row) for row in rows]


def test_where_positions_begin_does_not_matter():
    policy, layers = Hedge(**TOKENS, budget=0.3), contents()
    plain, late = (kept(policy, [seen_by(policy, [x], n, shift=s) for n, x in enumerate(layers)]) for s in (0, 500))
    assert plain == late


def test_models_without_rotary_positions_are_taken_as_they_are():
    policy, layers = Hedge(**TOKENS, budget=0.3), contents()
    views = [seen_by(policy, [row], layer, rotary=False) for layer, row in enumerate(layers)]
    level = (torch.ones(1, 40, DIM), torch.zeros(1, 40, DIM))
    still = [dataclasses.replace(view, rotary=level, state={}) for view in views]
    assert kept(policy, views) == kept(policy, still)
    assert "angle_step" not in views[0].state and "angle_step" in still[0].state


def test_the_longest_forward_tells_the_rotation():
    """In bfloat16 ten positions tell it coarsely; what a longer forward told stays."""
    policy, row = Hedge(**TOKENS, budget=0.5), contents(1, length=40)[0]
    view = seen_by(policy, [row], 0)
    rounded = dataclasses.replace(view, rotary=tuple(x.bfloat16().float() for x in view.rotary))
    policy.layer_budgets({0: rounded})
    told = rounded.state["angle_step"].clone()
    short = dataclasses.replace(rounded, rotary=tuple(x[:, -4:] for x in rounded.rotary))
    policy.layer_budgets({0: short})
    assert torch.equal(short.state["angle_step"], told)
    fresh = dataclasses.replace(short, state={})
    policy.layer_budgets({0: fresh})
    fine, coarse = (float((step[0] - torch.tensor(ANGLES)).abs().max()) for step in (told, fresh.state["angle_step"]))
    assert fine < 2e-4 < coarse


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_layers_share_exactly_what_there_is(budget):
    policy, layers = Hedge(**TOKENS, budget=budget), contents(5, length=30, seed=2)
    (got,) = kept(policy, [seen_by(policy, [row], layer) for layer, row in enumerate(layers)])
    sizes = [len(head) for layer in got for head in layer]
    assert sum(sizes) == 10 * math.ceil(budget * 30) and len(set(sizes)) > 1
    assert all({0, 28, 29} <= set(head) for layer in got for head in layer)


def test_equal_tokens_give_equal_budgets_nowhere_nan():
    """Nothing to tell tokens apart: the numbers are still exact, and the newest stay in the first head that may."""
    policy, same = Hedge(**TOKENS, budget=0.5), torch.ones(4, 20, DIM, dtype=torch.float64)
    views = [seen_by(policy, [(same, same[:2], same[:2])], layer, rotary=False) for layer in (0, 1)]
    (got,) = kept(policy, views)
    assert sum(len(head) for layer in got for head in layer) == 4 * 10
    assert got[0][0] == list(range(20))


def test_zero_keys_and_values_are_no_nan():
    policy, none = Hedge(**TOKENS, budget=0.5), torch.zeros(4, 12, DIM, dtype=torch.float64)
    view = seen_by(policy, [(none, none[:2], none[:2])], 0)
    policy.layer_budgets({0: view})
    assert bool(view.state["ranking"].isfinite().all())
    assert bool(policy.key_scale(view).isfinite().all())


def test_a_sliding_window_layer_has_a_budget_of_its_own():
    """It neither gives nor takes, and keeps nothing that its next query cannot see."""
    policy, layers = Hedge(**TOKENS, budget=0.25), contents(3)
    views = [seen_by(policy, [row], layer, window=16 if layer == 1 else None) for layer, row in enumerate(layers)]
    (got,) = kept(policy, views)
    assert sum(len(head) for head in got[1]) == 2 * 10
    assert all(p >= 40 - 15 or p == 0 for head in got[1] for p in head)
    assert [got[0], got[2]] == by_hand(policy, [layers[0], layers[2]])


def test_key_factors_leave_rotations_alone():
    """Both channels of a pair have one factor, and the largest pair has size 1."""
    policy, row = Hedge(budget=0.5), contents(1)[0]
    view = seen_by(policy, [row], 0)
    factors = policy.key_scale(view)
    assert torch.equal(*factors.chunk(2, -1))
    pairs = torch.hypot(*(view.k * factors[:, :, None]).chunk(2, -1)).amax(2)
    assert_close(pairs, torch.ones_like(pairs), SAME)
    bare = policy.key_scale(dataclasses.replace(view, rotary=None))
    assert_close((view.k * bare[:, :, None]).abs().amax(2), torch.ones_like(bare), SAME)


def test_key_factors_are_of_tokens():
    """The first token, at position 0, counts where it is the largest; an empty slot never, whatever lies in it."""
    policy, (q, k, v) = Hedge(budget=0.5), contents(1)[0]
    long, short = (q, 1.0 * k, v), (q[:, 20:], 0.01 * k[:, 20:], v[:, 20:])
    long[1][:, 0] *= 100
    view = seen_by(policy, [long, short], 0)
    assert bool((view.positions[1] < 0).any()) and int(view.positions[0, 0, 0]) == 0
    factors = policy.key_scale(view)
    assert_close(factors[0], policy.key_scale(seen_by(policy, [long], 0))[0], SAME)
    assert_close(factors[1], policy.key_scale(seen_by(policy, [short], 0))[0], SAME)
    pairs = torch.hypot(*(view.k * factors[:, :, None]).chunk(2, -1))
    assert_close(pairs[0, :, 0], torch.ones_like(pairs[0, :, 0]), SAME)


@pytest.fixture(scope="module")
def wide():
    """Heads of 64 channels in bfloat16, as real models have them."""
    return models.build("llama", head_dim=64, num_key_value_heads=2).to(torch.bfloat16)


@pytest.mark.parametrize("bits", ["int4", "k8v4", "fp8", "none"])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_the_budget_bounds_the_bytes_held(wide, budget, bits):
    """In bytes of the 16-bit cache, everything counted; what is not used would not hold another token per head."""
    ids = models.tokens(1, 600)
    with manyheads.use(wide):
        cache = caches.prefilled(wide, Hedge(budget=budget, bits=bits), ids)
        full = caches.prefilled(wide, "full", ids)
        heads = 2 * len(full.layers)
        held, whole = cache.bytes(), full.bytes()
    if bits == "none":
        tokens = sum(int((s.live.positions() >= 0).sum()) for s in caches.stores(cache))
        assert tokens == heads * math.ceil(budget * 600)
        return
    assert held <= budget * whole
    if (budget, bits) not in ((0.5, "int4"), (0.5, "k8v4")):
        assert held > budget * whole - heads * 300
    else:
        assert all(int((s.live.positions() >= 0).sum()) == 2 * 600 for s in caches.stores(cache))


@pytest.mark.parametrize(("budget", "want"), [(0.1, "int4"), (0.19, "int4"), (0.2, "fp8"), (0.5, "fp8"), (64, "fp8")])
def test_precision_goes_where_there_are_bytes_for_it(budget, want):
    assert Hedge(budget=budget).codec.name == want
    assert Hedge(budget=1.0).codec is None and Hedge(budget=budget, bits="int4").codec.name == "int4"


@pytest.mark.parametrize(
    ("layers", "budget", "want"), [(2, 0.5, "k8v4"), (2, 0.49, "int4"), (2, 100, "int4"), (16, 0.5, "fp8")]
)
def test_few_heads_keep_more_tokens_instead(layers, budget, want):
    """Two key/value heads a layer: 4 in all remember for the whole model, or 32."""
    model = models.build("llama", num_key_value_heads=2, num_hidden_layers=layers)
    with manyheads.use(model):
        cache = caches.prefilled(model, Hedge(budget=budget, whole=0), models.tokens(1, 200))
    assert {store.tokens.codec.name for store in caches.stores(cache)} == {want}


def test_four_bits_hold_more_tokens_than_sixteen(wide):
    ids, count = models.tokens(1, 600), {}
    with manyheads.use(wide):
        for bits in ("int4", "k8v4", "fp8", "none"):
            cache = caches.prefilled(wide, Hedge(budget=0.2, bits=bits), ids)
            count[bits] = sum(int((s.live.positions() >= 0).sum()) for s in caches.stores(cache))
    assert count["int4"] > 2.5 * count["none"] and count["fp8"] > 1.4 * count["none"]
    assert 1.15 * count["fp8"] < count["k8v4"] < count["int4"] / 1.15


def test_off_means_off():
    model = models.tiny("llama")
    caches.off_means_off(model, Hedge(budget=1.0), Hedge(budget=1000, bits="none"))


@pytest.mark.parametrize("length", [1, 2, 30])
def test_short_prompts(length):
    """One token, fewer queries than the window, and a prompt that is just protected."""
    model, policy = models.tiny("llama"), Hedge(budget=24, window_size=64)
    with manyheads.use(model):
        cache = caches.prefilled(model, policy, models.tokens(2, length))
        logits = caches.step(model, models.tokens(2, 1, seed=1), cache)
        assert bool(logits.isfinite().all())
        assert int(cache.get_seq_length()) == length + 1


def test_a_fork_is_the_policy_itself():
    model, ids = models.tiny("llama"), models.tokens(2, 50)
    for policy in (Hedge(budget=0.5, bits="none", window_size=16), Hedge(budget=36, window_size=16)):
        with manyheads.use(model):
            own = caches.prefilled(model, policy, ids)
            shared = new_cache(model, manyheads.parse("full"), record=16)
            caches.step(model, ids, shared)
            fork = shared.fork(policy)
            last = models.tokens(2, 1, seed=3)
            assert torch.equal(caches.step(model, last, own), caches.step(model, last, fork))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"distinct": 0.0}, "between 0 and 1"), ({"distinct": 1.0}, "between 0 and 1"),
        ({"window_size": 0}, "at least 1"), ({"schedule": "step"}, "prefill, turn or chunk"),
        ({"schedule": 3}, "prefill, turn or chunk"), ({"budget": 8}, "protected"), ({"budget": 1.5}, "at most 1.0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Hedge(**fields)
