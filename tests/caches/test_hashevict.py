# SPDX-License-Identifier: Apache-2.0
"""HashEvict: which key is overwritten, what is never overwritten, and what it becomes at the edges of its settings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from caches.formula import DIM, drive, sequences
from manyheads import UserError, parse
from manyheads.integrations.transformers import new_cache
from oracles import models
from tolerance import CLOSE, SAME, assert_close, error


def by_hand(policy, q, k, v, sizes):
    """One row in float64 and loops: a step at a time, evicted by Hamming distance of boolean hashes, then attention."""
    planes = policy.projections(DIM, 0, torch.device("cpu"))

    def bits(x):
        return [bool(b) for b in (x @ planes >= 0)]

    groups, prompt = q.shape[0] // k.shape[0], sizes[0]
    room = (
        policy.budget
        if isinstance(policy.budget, int)
        else math.ceil(round(policy.budget * (prompt + policy.reserve), 9))
    )
    held = [
        sorted(set(range(policy.num_global)) | set(range(prompt)), key=lambda s: (s >= policy.num_global, -s))[:room]
        for _ in k
    ]
    if policy.prompt == "hashed":
        prompt, held = 0, [[] for _ in k]
    out = torch.zeros(q.shape[1], q.shape[0], DIM, dtype=torch.float64)
    for t in range(q.shape[1]):
        for h, mine in enumerate(held):
            heads = range(h * groups, (h + 1) * groups)
            if t >= prompt and len(mine) >= room:
                probes = [bits(q[g, t]) for g in heads] if policy.probe == "query" else [bits(k[h, t])]
                free = [s for s in mine if s >= policy.num_global and s < t - policy.num_recent]
                distance = {s: sum(x != y for p in probes for x, y in zip(p, bits(k[h, s]), strict=True)) for s in free}
                mine.remove(max(free, key=lambda s: (distance[s], -s)))
            if t >= prompt:
                mine.append(t)
            sees = list(range(t + 1)) if t < prompt else mine
            for g in heads:
                x = k[h, sees].double() @ q[g, t].double() / math.sqrt(DIM)
                out[t, g] = x.softmax(0) @ v[h, sees].double()
    return out, [sorted(mine) for mine in held]


SPECS = {
    "slots": "hashevict:budget=6,num_global=1,num_recent=2",
    "fraction": "hashevict:budget=0.6,num_global=1,num_recent=1,num_bits=5",
    "reserve": "hashevict:budget=0.5,num_global=1,num_recent=1,reserve=12",
    "unprotected": "hashevict:budget=4,num_global=0,num_recent=0,num_bits=64,seed=3",
    "room for the prompt": "hashevict:budget=12,num_global=2,num_recent=3",
    "hashed": "hashevict:budget=6,num_global=1,num_recent=2,prompt=hashed",
    "hashed fraction": "hashevict:budget=0.5,num_global=1,num_recent=1,prompt=hashed",
}
SIZES = [10] + [1] * 12


@pytest.mark.parametrize("padding", [(0, 0), (0, 4)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("probe", ["query", "key"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_against_loops(spec, probe, heads, padding):
    policy = parse(f"{spec},probe={probe}")
    q, k, v = sequences(2, heads, sum(SIZES), seed=5)
    out, kept, _ = drive(policy, q, k, v, SIZES, list(padding) if any(padding) else None)
    for b, skip in enumerate(padding):
        own = [SIZES[0] - skip, *SIZES[1:]]
        want, held = by_hand(policy, q[b, :, skip:], k[b, :, skip:], v[b, :, skip:], own)
        assert [sorted(p for p in head if p >= 0) for head in kept[-1][b].tolist()] == held
        assert_close(out[b, skip:].double(), want, CLOSE)


def test_control_of_the_loops():
    q, k, v = sequences(1, 4, sum(SIZES), seed=5)
    _, kept, _ = drive(parse(SPECS["slots"]), q, k, v, SIZES)
    for other in ("probe=key", "seed=1", "num_bits=3", "num_recent=1"):
        name, value = other.split("=")
        fields = [f for f in SPECS["slots"].partition(":")[2].split(",") if not f.startswith(name)]
        _, held = by_hand(parse(f"hashevict:{','.join([*fields, other])}"), q[0], k[0], v[0], SIZES)
        assert [sorted(p for p in head if p >= 0) for head in kept[-1][0].tolist()] != held, (
            f"{name}={value} changes nothing"
        )


@pytest.mark.parametrize("padding", [None, [0, 3]])
@pytest.mark.parametrize("probe", ["query", "key"])
def test_a_hashed_prompt_is_read_as_it_streams(probe, padding):
    """In one forward, in pieces, or token by token: the same outputs, and the same tokens are left."""
    policy = parse(f"hashevict:budget=7,num_global=1,num_recent=2,prompt=hashed,probe={probe}")
    q, k, v = sequences(2, 4, 22, seed=3)
    want, kept, _ = drive(policy, q, k, v, [22], padding)
    for sizes in ([5, 17], [9, 4, 9], [4] + [1] * 18, [21, 1]):
        out, also, _ = drive(policy, q, k, v, sizes, padding)
        assert_close(out, want, CLOSE)
        assert torch.equal(also[-1].sort(-1).values[..., -7:], kept[-1].sort(-1).values[..., -7:])
    recent, others, _ = drive(parse(policy.spec.replace("prompt=hashed", "prompt=recent")), q, k, v, [22], padding)
    assert not torch.equal(others[-1].sort(-1).values[..., -7:], kept[-1].sort(-1).values[..., -7:])
    assert error(recent, want) > 100 * SAME  # there, every query of the prompt sees all before it


def test_a_hashed_prompt_is_no_fork():
    """What it keeps depends on a prefill of its own, so that none is shared with it."""
    assert parse("hashevict").dense_prefill and not parse("hashevict:prompt=hashed").dense_prefill
    model = models.build("llama")
    ids = torch.arange(30)[None] % 40 + 1
    with torch.no_grad(), manyheads.use(model):
        full = new_cache(model, parse("full"), record=64)
        model(ids, past_key_values=full)
        with pytest.raises(UserError, match="no fork"):
            full.fork(parse("hashevict:budget=12,num_global=1,num_recent=2,prompt=hashed"))


def test_a_hashed_prompt_in_a_model():
    """One forward of a model equals its pieces, and generation goes on from either."""
    model = models.build("llama")
    ids = torch.arange(40)[None] * 7 % 40 + 1
    policy = parse("hashevict:budget=14,num_global=2,num_recent=4,prompt=hashed")
    with torch.no_grad(), manyheads.use(model):
        whole, pieces = new_cache(model, policy), new_cache(model, policy)
        want = model(ids, past_key_values=whole).logits
        found = [model(piece, past_key_values=pieces).logits for piece in ids.split([9, 20, 11], 1)]
        assert_close(torch.cat(found, 1), want, SAME)
        after = [model(ids[:, :1], past_key_values=cache).logits for cache in (whole, pieces)]
        assert_close(after[0], after[1], CLOSE)


def test_room_for_everything_is_full():
    q, k, v = sequences(2, 4, sum(SIZES))
    want, _, _ = drive(parse("full"), q, k, v, SIZES)
    for budget in (22, 40, "1.0"):
        got, kept, _ = drive(parse(f"hashevict:budget={budget},num_global=2,num_recent=3"), q, k, v, SIZES)
        assert torch.equal(got, want) and bool((kept[-1] == torch.arange(22)).all())


def test_many_bits_find_the_largest_angle():
    """With 20,000 bits and clear gaps the evicted is the free key of least cosine with the probe."""
    generator = torch.Generator().manual_seed(0)
    for probe in ("query", "key"):
        policy = parse(f"hashevict:budget=9,num_global=1,num_recent=2,num_bits=20000,probe={probe}")
        checked = 0
        for seed in range(12):
            q, k, v = sequences(1, 2, 10, seed=seed)
            k[0, :, :9] = torch.nn.functional.normalize(torch.randn(2, 9, DIM, generator=generator), dim=-1)
            _, kept, _ = drive(policy, q, k, v, [9, 1])
            for h in range(2):
                target = q[0, h, 9] if probe == "query" else k[0, h, 9]
                angle = torch.acos(torch.cosine_similarity(k[0, h, 1:7], target, dim=-1))
                first, second = angle.topk(2).values.tolist()
                if first - second < 0.1:  # six standard deviations of the estimate
                    continue
                (evicted,) = set(range(10)) - set(kept[-1][0, h].tolist())
                assert evicted == 1 + int(angle.argmax())
                checked += 1
        assert checked >= 8


@pytest.mark.parametrize("probe", ["query", "key"])
def test_the_opposite_key_goes_as_soon_as_it_may(probe):
    """All keys point where the probe points, but one: it is overwritten as soon as nothing protects it."""
    direction = torch.ones(DIM)
    for odd in range(10):
        q, k, v = sequences(1, 4, 20)
        q[:], k[:] = direction, direction
        k[:, :, odd] = -direction
        policy = parse(f"hashevict:budget=10,num_global=3,num_recent=4,probe={probe}")
        _, kept, _ = drive(policy, q, k, v, [10] + [1] * 10)
        for t, positions in enumerate(kept[1:], start=10):
            free = odd >= 3 and odd < t - 4
            assert all((odd in head) != free for head in positions[0].tolist()), (odd, t)


@given(
    prompt=st.integers(1, 14), steps=st.lists(st.integers(1, 3), min_size=1, max_size=10), glob=st.integers(0, 3),
    recent=st.integers(0, 4), spare=st.integers(1, 6), probe=st.sampled_from(["query", "key"]), seed=st.integers(0, 20),
)  # fmt: skip
def test_protected_tokens_and_size(prompt, steps, glob, recent, spare, probe, seed):
    """Globals and the last tokens are there after any number of steps; filled = min(N, seen); no position twice."""
    size = glob + recent + spare
    policy = parse(f"hashevict:budget={size},num_global={glob},num_recent={recent},probe={probe}")
    sizes = [prompt, *steps]
    q, k, v = sequences(2, 4, sum(sizes), seed=seed)
    _, kept, store = drive(policy, q, k, v, sizes)
    seen = 0
    for n, positions in zip(sizes, kept, strict=True):
        seen += n
        for head in positions.flatten(0, 1).tolist():
            filled = [p for p in head if p >= 0]
            assert len(filled) == len(set(filled)) == min(size, seen)
            assert {*range(min(glob, seen)), *range(max(0, seen - 1 - recent), seen)} <= set(filled) <= set(range(seen))
    for b, h, n in (store.padded.positions() >= 0).nonzero().tolist():  # and every slot holds what it says
        position = int(store.padded.positions()[b, h, n])
        assert torch.equal(store.keys[b, h, n], k[b, h, position]) and torch.equal(
            store.values[b, h, n], v[b, h, position]
        )


@pytest.mark.parametrize("probe", ["query", "key"])
@pytest.mark.parametrize(("size", "glob"), [(8, 4), (5, 0), (6, 1)])
def test_one_candidate_is_streaming_llm(size, glob, probe):
    """With num_recent = N - num_global - 1 the only evicted is the token that leaves the window."""
    q, k, v = sequences(1, 4, 30)
    sizes = [12] + [1] * 18
    ours = parse(f"hashevict:budget={size},num_global={glob},num_recent={size - glob - 1},probe={probe}")
    got, kept, _ = drive(ours, q, k, v, sizes)
    _, window, _ = drive(parse(f"streaming_llm:budget={size},sinks={glob}"), q, k, v, sizes)
    for mine, theirs in zip(kept, window, strict=True):
        assert [sorted(p for p in h if p >= 0) for h in mine[0].tolist()] == theirs[0].tolist()
    assert bool(got.isfinite().all())


def test_seeds_layers_and_probes_differ_and_runs_do_not():
    q, k, v = sequences(1, 4, 40)

    def held(spec):
        return (
            drive(parse(f"hashevict:budget=10,num_global=1,num_recent=2{spec}"), q, k, v, [12] + [1] * 28)[1][-1]
            .sort(-1)
            .values
        )

    base = held("")
    assert torch.equal(held(""), base)
    assert not torch.equal(held(",seed=1"), base) and not torch.equal(held(",probe=key"), base)
    policy = parse("hashevict")
    one, two = (policy.projections(64, layer, torch.device("cpu")) for layer in (0, 1))
    assert one.shape == (64, 16) and not torch.equal(one, two)
    assert torch.equal(policy.projections(64, 0, torch.device("cpu")), one)


def test_hashes_take_an_eighth_of_a_byte_per_bit():
    q, k, v = sequences(1, 4, 20)
    for bits in (8, 16, 20):
        store = drive(parse(f"hashevict:budget=10,num_global=1,num_recent=2,num_bits={bits}"), q, k, v, [12, 1, 1])[2]
        hashes = store.padded.extras["hash"]
        assert hashes.dtype == torch.uint8 and hashes.shape == (1, 2, 11, -(-bits // 8))


@pytest.mark.parametrize(
    "fields",
    [
        "budget=14",
        "budget=5,num_global=2,num_recent=3",
        "num_bits=0",
        "num_global=-1",
        "num_recent=-2",
        "reserve=-1",
        "schedule=prefill",
        "probe=value",
        "prompt=whole",
    ],
)
def test_refuses(fields):
    with pytest.raises(UserError) as refusal:
        parse(f"hashevict:{fields}")
    assert "\n" not in str(refusal.value)
