# SPDX-License-Identifier: Apache-2.0
"""D2O: layer shares from the spread of attention mass, heavy hitters, and mergers, each against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from caches.formula import DIM, drive, sequences, site
from manyheads import UserError, parse
from manyheads.attention import reference
from manyheads.caches._view import CacheView
from manyheads.caches.d2o import absorb, density, nearest
from oracles import caches, models
from tolerance import CLOSE, SAME, assert_close, nearly

SIZES = [13, 1, 1, 4, 1, 1, 1]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def merged(x, into, similarity, weights, masses=()):
    """One kept vector after ``into`` joined it, with their similarities, and the masses of it and of them."""
    if weights == "attention":
        return sum(m * y for m, y in zip(masses, [x, *into], strict=True)) / sum(masses)
    if weights == "code":
        return (x + sum(u * y for y, u in zip(into, similarity, strict=True))) / (1 + len(into))
    total = math.e + sum(math.exp(u) for u in similarity)
    return (math.e * x + sum(math.exp(u) * y for y, u in zip(into, similarity, strict=True))) / total


def by_hand(policy, q, k, v, sizes):
    """One row, one layer, in float64 and loops: outputs, positions held by head, keys and values by position."""
    q, k, v = q.double(), k.double().clone(), v.double().clone()
    groups, start, out = q.shape[0] // k.shape[0], 0, torch.zeros(q.shape[1], q.shape[0], DIM, dtype=torch.float64)
    held, mass, tau = [[] for _ in k], [{} for _ in k], [None for _ in k]
    for n in sizes:
        for h, mine in enumerate(held):
            mine += range(start, start + n)
            for t in range(start, start + n):
                sees = [s for s in mine if s <= t]
                for g in range(h * groups, (h + 1) * groups):
                    weights = (k[h, sees] @ q[g, t] / math.sqrt(DIM)).softmax(0)
                    out[t, g] = weights @ v[h, sees]
                    for s, w in zip(sees, weights.tolist(), strict=True):
                        mass[h][s] = mass[h].get(s, 0.0) + w
        start += n
        whole = isinstance(policy.budget, int)
        room = min(policy.budget, start) if whole else math.ceil(round(policy.budget * start, 9))
        recent = max(0, min(int(room * policy.recent_share), room - policy.sinks))
        for h, mine in enumerate(held):
            fixed = {s for s in mine if s < policy.sinks or s >= start - recent}
            ranked = sorted(mine, key=lambda s: (s in fixed, mass[h][s], s), reverse=True)
            kept, gone = sorted(ranked[:room]), sorted(ranked[room:])
            held[h] = kept
            if not gone or not policy.merging:
                continue
            near = {i: max(((cosine(k[h, i], k[h, c]), c) for c in kept), key=lambda pair: pair[0]) for i in gone}
            mean = sum(u for u, _ in near.values()) / len(near)
            tau[h] = mean if tau[h] is None else policy.alpha * tau[h] + policy.beta * mean
            for x in (k, v):
                before = x[h].clone()
                for c in kept:
                    joins = [(i, u) for i, (u, to) in near.items() if to == c and u >= tau[h]]
                    if joins:
                        into, similarity = [before[i] for i, _ in joins], [u for _, u in joins]
                        masses = [mass[h][c], *(mass[h][i] for i, _ in joins)]
                        x[h, c] = merged(before[c], into, similarity, policy.weights, masses)
    return out, held, k, v


SPECS = {
    "slots": "d2o:budget=8",
    "fraction": "d2o:budget=0.6,recent_share=0.5",
    "code": "d2o:budget=7,weights=code,sinks=2",
    "attention": "d2o:budget=7,weights=attention,sinks=2",
    "ema": "d2o:budget=7,alpha=0.2,beta=0.7,sinks=1,recent_share=0.4",
    "drop": "d2o:budget=8,merging=False",
    "no recent": "d2o:budget=6,recent_share=0,sinks=0",
}


@pytest.mark.parametrize("padding", [(0, 0), (0, 4)])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_against_loops(spec, heads, padding):
    policy = parse(spec)
    q, k, v = sequences(2, heads, sum(SIZES), seed=5)
    out, kept, store = drive(policy, q, k, v, SIZES, list(padding) if any(padding) else None)
    for b, skip in enumerate(padding):
        own = [SIZES[0] - skip, *SIZES[1:]]
        want, held, keys, values = by_hand(policy, q[b, :, skip:], k[b, :, skip:], v[b, :, skip:], own)
        assert [sorted(p for p in head if p >= 0) for head in kept[-1][b].tolist()] == held
        assert_close(out[b, skip:].double(), want, CLOSE)
        for h, head in enumerate(kept[-1][b].tolist()):
            for slot, position in enumerate(head):
                if position >= 0:
                    assert_close(store.keys[b, h, slot].double(), keys[h, position], CLOSE)
                    assert_close(store.values[b, h, slot].double(), values[h, position], SAME)


@pytest.mark.parametrize(
    "other", ["weights=code", "weights=attention", "alpha=0.9", "recent_share=0.6", "merging=False", "sinks=6"]
)
def test_control_of_the_loops(other):
    q, k, v = sequences(1, 4, sum(SIZES), seed=5)
    out, _, _ = drive(parse("d2o:budget=8"), q, k, v, SIZES)
    want, *_ = by_hand(parse(f"d2o:budget=8,{other}"), q[0], k[0], v[0], SIZES)
    with pytest.raises(AssertionError):
        assert_close(out[0].double(), want, SAME)


# Merging


def view(k, v, kept, state=None):
    """A view of slots in order, and its kept slots as a mask ``[B, Hkv, N]``."""
    positions = torch.arange(k.shape[2]).expand(k.shape[:3])
    counts = torch.full((k.shape[0],), k.shape[2])
    made = CacheView(k, v, positions, counts, None, DIM**-0.5, None, None, site(), state={} if state is None else state)
    return made, torch.isin(positions, torch.tensor(kept))


def thresholds(value):
    return {"threshold": torch.full((1, 2), value)}


@given(size=st.integers(2, 12), number=st.integers(1, 11), seed=st.integers(0, 50), code=st.booleans())
def test_mergers_against_loops(size, number, seed, code):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, 2, size, DIM, generator=generator, dtype=torch.float64).float()
    keep = torch.randperm(size, generator=generator)[: min(number, size - 1)].sort().values.tolist()
    policy = parse(f"d2o:weights={'code' if code else 'paper'}")
    seen, kept = view(k, v, keep)
    keys, values = policy.merge(seen, kept)
    for h in range(2):
        k64, v64 = k[0, h].double(), v[0, h].double()
        gone = [i for i in range(size) if i not in keep]
        near = {i: max(((cosine(k64[i], k64[c]), c) for c in keep), key=lambda pair: pair[0]) for i in gone}
        tau = sum(u for u, _ in near.values()) / len(near)
        for c in keep:
            joins = [(i, u) for i, (u, to) in near.items() if to == c and u >= tau - 1e-7]
            for x, got in ((k64, keys), (v64, values)):
                want = merged(x[c], [x[i] for i, _ in joins], [u for _, u in joins], policy.weights) if joins else x[c]
                assert_close(got[0, h, c].double(), want, SAME)


def test_blocks_change_nothing(monkeypatch):
    _, k, _ = sequences(2, 4, 40)
    at = torch.randperm(40)[:17].expand(2, 2, 17)
    kept = torch.ones(2, 2, 40, dtype=torch.bool).scatter(2, at, False)
    want = nearest(k, at, kept)
    monkeypatch.setitem(reference._SCRATCH, "cpu", 500)
    got = nearest(k, at, kept)
    assert torch.equal(got[1], want[1])
    assert_close(got[0], want[0], CLOSE)


@pytest.mark.parametrize("weights", ["paper", "code"])
def test_thresholds_at_the_ends(weights):
    """tau = +inf merges nothing, tau = -inf every dropped token; the EMA leaves both where they are."""
    _, k, v = sequences(1, 4, 9)
    policy = parse(f"d2o:weights={weights}")
    seen, kept = view(k, v, [0, 3, 8], thresholds(torch.inf))
    keys, values = policy.merge(seen, kept)
    assert torch.equal(keys, k) and torch.equal(values, v)
    seen, kept = view(k, v, [0, 3, 8], thresholds(-torch.inf))
    keys, _ = policy.merge(seen, kept)
    gone = torch.tensor([1, 2, 4, 5, 6, 7]).expand(1, 2, 6)
    _, target = nearest(k, gone, kept)
    for h in range(2):
        moved = [c for c in range(9) if not torch.equal(keys[0, h, c], k[0, h, c])]
        assert moved == sorted(set(target[0, h].tolist()))


def test_merging_equals_changes_nothing():
    """Every dropped token equals its nearest kept one: convex weights leave that bit for bit as it is."""
    for dtype in (torch.float32, torch.bfloat16):
        _, k, v = sequences(1, 4, 4, dtype=dtype)
        k, v = k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1)
        seen, kept = view(k, v, [0, 1, 2, 3], thresholds(-torch.inf))
        keys, values = parse("d2o").merge(seen, kept)
        assert torch.equal(keys, k) and torch.equal(values, v)


def test_equal_keys_and_values_keep_the_output():
    """All keys and all values alike: whatever is merged or dropped, attention gives that value."""
    q, k, v = sequences(2, 4, 20)
    k[:], v[:] = k[:, :, :1], v[:, :, :1]
    for spec in ("d2o:budget=6", "d2o:budget=6,merging=False"):
        out, _, _ = drive(parse(spec), q, k, v, [14, 1, 1, 4])
        assert_close(out, v[:, :, :1].transpose(1, 2).repeat_interleave(2, 2).expand_as(out), CLOSE)
    out, _, _ = drive(parse("d2o:budget=6,weights=code"), q, k, v * torch.linspace(1, 2, 20)[:, None], [14, 1, 1, 4])
    with pytest.raises(AssertionError):
        assert_close(out, v[:, :, :1].transpose(1, 2).repeat_interleave(2, 2).expand_as(out), SAME)


@given(seed=st.integers(0, 100), size=st.integers(3, 20))
def test_convex_weights_stay_inside(seed, size):
    """Each channel of a merged key or value lies between those that went into it; released weights leave that."""
    k, v = torch.randn(2, 1, 2, size, DIM, generator=torch.Generator().manual_seed(seed))
    seen, kept = view(k, v, range(0, size, 3), thresholds(-torch.inf))
    for got, x in zip(parse("d2o").merge(seen, kept), (k, v), strict=True):
        assert bool((got <= x.amax(2, keepdim=True) + 1e-6).all() and (got >= x.amin(2, keepdim=True) - 1e-6).all())


def test_control_of_convex_weights():
    k = torch.tensor([[1.0, 1.0], [1.0, -0.9]]).repeat(1, 3).expand(1, 2, 2, 6)
    seen, kept = view(k, torch.ones(1, 2, 2, 6), [0], thresholds(-torch.inf))
    assert float(parse("d2o").merge(seen, kept)[1].min()) == 1.0
    assert float(parse("d2o:weights=code").merge(seen, kept)[1].min()) < 0.9


def test_threshold_closed_form():
    """tau_n = alpha^n tau_0 + sum of alpha^(n - i) beta mean_i, for each key/value head by itself."""
    policy, state, means = parse("d2o:alpha=0.3,beta=0.6"), {}, []
    for n in range(6):
        _, k, v = sequences(1, 4, 10, seed=n)
        seen, kept = view(k, v, [0, 1, 5], state)
        gone = torch.tensor([2, 3, 4, 6, 7, 8, 9]).expand(1, 2, 7)
        means.append(nearest(k, gone, kept)[0].mean(-1))
        policy.merge(seen, kept)
        closed = 0.3**n * means[0] + sum(0.3 ** (n - i) * 0.6 * means[i] for i in range(1, n + 1))
        assert_close(state["threshold"], closed, CLOSE)


def test_heads_that_drop_nothing_keep_their_threshold():
    _, k, v = sequences(1, 4, 8)
    state = thresholds(0.25)
    seen, kept = view(k, v, range(8), state)
    kept[0, 1, 3] = False
    parse("d2o").merge(seen, kept)
    assert float(state["threshold"][0, 0]) == 0.25 and float(state["threshold"][0, 1]) != 0.25
    seen, kept = view(k, v, range(8), fresh := {})
    assert parse("d2o").merge(seen, kept) is None and not fresh


@pytest.mark.parametrize("weights", ["paper", "code"])
def test_half_precision(weights):
    """Merged in float32 and rounded once."""
    _, k, v = sequences(1, 4, 12, dtype=torch.bfloat16)
    at, kept = torch.arange(4, 12).expand(1, 2, 8), torch.arange(12).expand(1, 2, 12) < 4
    given = at, *nearest(k, at, kept)[::-1], torch.ones_like(at, dtype=torch.bool), weights
    assert torch.equal(absorb(v, *given), absorb(v.float(), *given).bfloat16())


# Layers


def test_density_against_loops():
    generator = torch.Generator().manual_seed(0)
    mass, valid = torch.rand(3, 4, 9, generator=generator), torch.ones(3, 1, 9, dtype=torch.bool)
    valid[1, :, :4] = False
    for b in range(3):
        own = mass[b][:, valid[b, 0]].double()
        spread = [float(row.var()) for row in own]
        low, high = min(spread), max(spread)
        want = sum((x - low) / (high - low + 1e-6) for x in spread) / 4
        assert abs(float(density(mass, valid)[b]) - want) < 1e-5
    assert density(torch.ones(2, 4, 9), valid[:2]).tolist() == [0.0, 0.0]  # no spread at all
    assert density(mass[:, :1], valid).tolist() == [0.0, 0.0, 0.0]  # one head: nothing to compare with


def shares(policy, spreads, count=1000):
    """r_l of layers with densities ``spreads [L][B]``."""
    views = {}
    for layer, spread in enumerate(spreads):
        k = torch.zeros(len(spread), 2, 1, DIM)
        here, _ = view(k, k, [0], {"density": torch.tensor(spread)})
        peers = tuple(range(len(spreads)))
        place = manyheads.call.Site("here", layer, layer, "self", True, 4, 2, peers=peers)
        views[layer] = CacheView(k, k, here.positions, torch.full((len(spread),), count), None, 1.0, None, None, place,
                            state=here.state)  # fmt: skip
    found = policy.layer_budgets(views)
    rho = policy.budget if isinstance(policy.budget, float) else min(policy.budget, count) / count
    return [torch.as_tensor(found[layer]) * rho for layer in views], views


def test_shares():
    spread = [[0.2, 0.5], [0.9, 0.5], [0.4, 0.5], [0.6, 0.5]]
    for spec in ("d2o:budget=0.3", "d2o:budget=300"):
        parts, views = shares(parse(spec), spread)
        want = torch.softmax(-torch.tensor(spread).double(), 0) * 4 * 0.3
        assert_close(torch.stack(parts).double(), want, CLOSE)
        assert abs(float(torch.stack(parts)[:, 0].sum()) - 4 * 0.3) < 1e-5  # the sum is kept
        assert sorted(range(4), key=lambda layer: -parts[layer][0]) == [0, 2, 3, 1]  # spread is paid for
        assert all(abs(float(part[1]) - 0.3) < 1e-6 for part in parts)  # equal densities: rho for all
        for part, seen in zip(parts, views.values(), strict=True):
            assert (seen.state["recent"] - part * 1000 * 0.25).abs().max() <= 1


def test_shares_are_clamped():
    parts, _ = shares(parse("d2o:budget=0.9"), [[0.0], [0.0], [1.0]])
    assert [float(part) for part in parts[:2]] == nearly([1.0, 1.0])
    assert sum(float(part) for part in parts) < 3 * 0.9  # and not shared out again
    parts, _ = shares(parse("d2o:budget=0.015"), [[0.0], [1.0]])
    assert float(parts[1]) == nearly(0.01, torch.float32) and sum(map(float, parts)) > 2 * 0.015


def test_layers_left_whole_and_room_for_everything():
    parts, _ = shares(parse("d2o:budget=0.25,skip_layers=code"), [[x / 6] for x in range(6)])
    assert [round(float(part), 5) for part in parts[:2] + parts[-1:]] == [1.0] * 3
    assert all(float(part) < 0.5 for part in parts[2:-1])
    parts, _ = shares(parse("d2o:budget=0.25,skip_layers=code,layer_alloc=uniform"), [[0.0]] * 4)
    assert [round(float(part), 5) for part in parts] == [1.0, 1.0, 0.25, 1.0]
    parts, _ = shares(parse("d2o:budget=2000"), [[0.0], [1.0]])
    assert [float(part) for part in parts] == [1.0, 1.0]


def test_layers_of_a_model():
    """Slots of each layer after the prompt: its share, from the attention maps of the model's own eager attention."""
    model, ids = models.build("llama", num_hidden_layers=4, attn="eager"), models.tokens(3, 60)
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    spread = []
    for weights in maps:
        variance = weights.double().sum(2).var(-1)  # [B, H]
        low, high = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
        spread.append(((variance - low) / (high - low + 1e-6)).mean(1))
    room = (torch.softmax(-torch.stack(spread), 0) * 4 * 24).round()  # 0.4 of 60
    assert int(room.max()) > int(room.min()) + 2
    with manyheads.use(model):
        cache = caches.prefilled(model, "d2o:budget=0.4", ids)
    for layer, store in enumerate(caches.stores(cache)):
        held = (store.live.positions() >= 0).sum(-1)
        assert torch.equal(held, room[layer].long()[:, None].expand_as(held))


# The whole


@pytest.mark.parametrize("spec", ["budget=9", "budget=0.5", "budget=12,recent_share=0.5,sinks=2"])
def test_size_and_protection_at_every_step(spec):
    """A uniform budget is filled exactly after every step; the first tokens and the last of its share are there."""
    policy = parse(f"d2o:{spec},layer_alloc=uniform")
    q, k, v = sequences(2, 4, 40)
    sizes = [16] + [1] * 12 + [5] + [1] * 7
    _, kept, _ = drive(policy, q, k, v, sizes)
    for seen, positions in zip(torch.tensor(sizes).cumsum(0).tolist(), kept, strict=True):
        room = policy.budget if isinstance(policy.budget, int) else math.ceil(policy.budget * seen)
        must = {*range(policy.sinks), *range(seen - int(room * policy.recent_share), seen)}
        for head in positions.flatten(0, 1).tolist():
            held = [p for p in head if p >= 0]
            assert len(held) == len(set(held)) == room and must <= set(held)


@pytest.mark.parametrize("budget", ["1.0", "1000"])
def test_room_for_everything_is_full(budget):
    for name in ("llama", "gemma2", "gpt2"):
        caches.off_means_off(models.tiny(name), f"d2o:budget={budget}", f"d2o:budget={budget},skip_layers=code")


def test_without_merging_and_shares_it_is_h2o():
    model, ids = models.tiny("llama"), models.tokens(2, 24)
    h2o = "h2o:budget=10,sinks=4,recent_share=0.25"
    outputs = {}
    for spec in (h2o, "d2o:budget=10,merging=False,layer_alloc=uniform", "d2o:budget=10,layer_alloc=uniform"):
        with manyheads.use(model, spec):
            outputs[spec] = caches.greedy(model, ids)[1]
    first, same, other = outputs.values()
    assert torch.equal(first, same)
    with pytest.raises(AssertionError):
        assert_close(first, other)


LIVE = "d2o:budget=9,sinks=2"


def test_a_fork_is_a_direct_run():
    """From a shared prefill: the same mass and densities, so the same shares, mergers and tokens."""
    model, ids = models.build("llama", num_hidden_layers=3), models.tokens(2, 24)
    for spec in (LIVE, "d2o:budget=0.5,skip_layers=code,weights=code"):
        with manyheads.use(model):
            fork = caches.prefilled(model, "full", ids, record=2**31).fork(parse(spec))
            direct = caches.prefilled(model, spec, ids)
            for t in range(5):
                last = models.tokens(2, 1, seed=t)
                assert_close(caches.step(model, last, fork), caches.step(model, last, direct), CLOSE)


@pytest.mark.parametrize("spec", ["weights=code", "merging=False,schedule=3", "skip_layers=code,alpha=1,beta=0"])
def test_batch_equals_singles(spec):
    caches.batch_equals_singles_padded_left(models.tiny("llama", torch.float64), f"d2o:budget=0.6,sinks=1,{spec}")


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt2", "gpt_oss"])
def test_in_other_architectures(name):
    caches.batch_equals_singles_padded_left(models.tiny(name, torch.float64), LIVE)


def test_latent_caches_are_not_merged():
    model = models.tiny("deepseek_v3", torch.float64)
    caches.batch_equals_singles_padded_left(model, f"{LIVE},merging=False")
    with pytest.raises(UserError, match="merging=False"), manyheads.use(model, LIVE):
        caches.greedy(model, models.tokens(1, 20))


@pytest.mark.parametrize("fields", ["recent_share=1.5", "weights=mean", "layer_alloc=pyramid", "budget=3", "sinks=-1"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"d2o:{fields}")
