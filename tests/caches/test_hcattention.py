# SPDX-License-Identifier: Apache-2.0
"""HCAttention: codes, what is kept, what is exact, where everything lies; against loops, bounds and full attention."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from caches.formula import DIM, sequences, site
from manyheads import UserError, parse
from manyheads.attention import product_codes, reference
from manyheads.attention.padded import nbytes
from manyheads.caches._codebooks import FILE, read_codebooks, write_codebooks
from manyheads.caches._rounding import rounded
from manyheads.call import AttentionCall
from manyheads.integrations.transformers import load_cache, new_cache, prefill, save_cache
from manyheads.recipes import hcattention as recipe
from oracles import caches, models
from oracles.caches import greedy, prefilled, step, stores
from oracles.models import tokens
from oracles.strategies import Watch
from tolerance import FORMULA, SAME, assert_close, error

SINKS, RECENT, SIZES = 2, 3, [11, 1, 1, 4, 1, 1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Codebooks of the tiny models: random ones, for two layers of 2 heads, 4 sub-vectors of 2 channels."""
    place, made = tmp_path_factory.mktemp("codebooks"), torch.Generator().manual_seed(3)
    write_codebooks(place, {i: torch.randn(2, 4, 9, 2, generator=made) for i in range(2)}, {"model": "tiny"})
    return place


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Codebooks for the sequences of ``formula``: 3 sub-vectors of 2 channels."""
    place, made = tmp_path_factory.mktemp("small"), torch.Generator().manual_seed(4)
    write_codebooks(place, {0: torch.randn(2, DIM // 2, 7, 2, generator=made).double()}, {"model": "formula"})
    return place


def drive(policy, q, k, v, sizes, real=None, scale=DIM**-0.5):
    """A store as a model would run it: outputs ``[B, T, H, d]`` and the store; ``real [B, T]``, no padding."""
    store, outputs, start = policy.store(site()), [], 0
    for n in sizes:
        cut = slice(start, start + n)
        keys, values = store.update(k[:, :, cut], v[:, :, cut])
        start += n
        mask = None if real is None else (reference.causal_mask(n, start)[None] & real[:, None, :start])[:, None]
        call = AttentionCall(site(), q[:, :, cut], keys, values, scale, mask=mask, is_causal=mask is None and n > 1)
        out = store.attend(call)
        if out is None:
            call = store.mask(call)
            out = call.attend()
            store.evict(call)
        outputs.append(out)
    return torch.cat(outputs, 1), store


def coded(k, books):
    """Keys as their codes have them, by loops: ``k [Hkv, T, d]``, ``books [Hkv, g, c, w]``."""
    out, width = torch.zeros_like(k), books.shape[3]
    for h in range(k.shape[0]):
        for t in range(k.shape[1]):
            for g in range(books.shape[1]):
                part = slice(g * width, (g + 1) * width)
                out[h, t, part] = min(books[h, g], key=lambda c: float((k[h, t, part] - c).norm()))
    return out


def eighth(v):
    """Values ``[Hkv, T, d]`` as FP8 with a bfloat16 scale has them, number by number."""
    out = torch.zeros_like(v)
    for h in range(v.shape[0]):
        for t in range(v.shape[1]):
            scale = (v[h, t].float().abs().max() / 448).bfloat16().double()
            for i, x in enumerate(v[h, t]):
                y = float(x / scale)
                step = 2.0 ** max(math.floor(math.log2(max(abs(y), 1e-9))) - 3, -9)  # e4m3: 3 bits behind the point
                out[h, t, i] = max(-448.0, min(448.0, round(y / step) * step)) * scale
    return out


def by_hand(policy, q, k, v, books, prompt, scale=DIM**-0.5):
    """One row in float64 and loops: ``q [H, T, d]``, ``k, v [Hkv, T, d]`` -> ``[T, H, d]``."""
    q, k, v, groups = q.double(), k.double(), v.double(), q.shape[0] // k.shape[0]
    stored = {"whole": v, "int4": rounded(v, -1), "fp8": eighth(v)}[policy.values]
    hat, out = coded(k, books.double()), torch.zeros(q.shape[1], q.shape[0], v.shape[2], dtype=torch.float64)
    for t in range(q.shape[1]):
        for g in range(q.shape[0]):
            h = g // groups
            exact = [s for s in range(t + 1) if t < prompt or s < policy.sinks or s > t - policy.recent]
            rest = [s for s in range(t + 1) if s not in exact]
            x = torch.tensor([float(q[g, t] @ (k if s in exact else hat)[h, s]) * scale for s in range(t + 1)])
            a = x.double().softmax(0)
            kept, mass = list(exact), sum(float(a[s]) for s in exact)
            last = None
            for i, s in enumerate(sorted(rest, key=lambda s: -float(a[s]))):
                enough = i >= policy.top_k if policy.top_k else policy.top_p < 1 and mass >= policy.top_p
                if enough and (last is None or float(a[last] - a[s]) > 1e-9):  # what ties with the last stays with it
                    break
                kept, mass, last = [*kept, s], mass + float(a[s]), s
            out[t, g] = sum(float(a[s]) * (v if s in exact else stored)[h, s] for s in kept) / (
                mass if policy.renormalize or t < prompt else 1
            )
    return out


VARIANTS = [
    "top_p=0.9", "top_p=0.5", "top_p=1.0", "top_k=2", "top_p=0.6,renormalize=False", "combine=host", "sinks=0",
    "values=int4", "values=fp8",
]  # fmt: skip


@pytest.mark.parametrize("real", [None, [[0, 20], [5, 20]], [[0, 11], [0, 8]]], ids=["whole", "left", "right"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("more", VARIANTS)
def test_against_loops(small, more, heads, real):
    """One by one and several at once, rows padded left and right: the formula, with the keys that are coded then."""
    more = more if "sinks" in more else f"{more},sinks={SINKS}"
    policy = parse(f"hcattention:codebooks={small},recent={RECENT},{more}")
    books = read_codebooks(str(small))[0][0]
    q, k, v = (x.double() for x in sequences(2, heads, sum(SIZES), seed=5))
    valid = None
    if real is not None:
        valid = torch.zeros(2, sum(SIZES), dtype=torch.bool)
        for row, (first, last) in enumerate(real):
            valid[row, first:last] = True
        valid[:, SIZES[0] :] = True
    out, _ = drive(policy, q, k, v, SIZES, valid)
    for b in range(2):
        own = torch.arange(sum(SIZES)) if valid is None else valid[b].nonzero()[:, 0]
        prompt = int((own < SIZES[0]).sum())
        want = by_hand(policy, q[b, :, own], k[b, :, own], v[b, :, own], books, prompt)
        assert_close(out[b, own], want, 1e-6)  # a sum of logits by hand is float32


def test_the_loops_notice(small):
    """Wrong variants: another share, window or codebook, or keys that were not coded at all."""
    spec = f"hcattention:codebooks={small},sinks={SINKS},recent={RECENT},top_p=0.6"
    policy, books = parse(spec), read_codebooks(str(small))[0][0]
    q, k, v = (x.double() for x in sequences(1, 4, sum(SIZES), seed=5))
    want = by_hand(policy, q[0], k[0], v[0], books, SIZES[0])
    assert error(drive(policy, q, k, v, SIZES)[0][0], want) < 1e-6
    for change in (
        "top_p=0.9",
        f"recent={RECENT + 1}",
        f"sinks={SINKS + 1}",
        "renormalize=False",
        "top_k=1",
        "values=int4",
    ):
        name = change.partition("=")[0]
        other = ",".join([part for part in spec.split(",") if not part.startswith(f"{name}=")] + [change])
        assert error(drive(parse(other), q, k, v, SIZES)[0][0], want) > 1e-3, change
    assert error(want, by_hand(policy, q[0], k[0], v[0], books.roll(1, 1), SIZES[0])) > 1e-3


def blocks_by_hand(policy, q, k, v, books, sizes, block=128, nearest=True):
    """``prompt=blocks`` for one row in float64: ``q [H, T, d]``, ``k, v [Hkv, T, d]`` -> ``[T, H, d]``."""
    parts = k.unflatten(2, (books.shape[1], -1)).transpose(1, 2)  # [Hkv, g, T, w]
    at = torch.cdist(parts, books).argmin(3)
    hat = books.gather(2, at[..., None].expand_as(parts)).transpose(1, 2).flatten(2)
    stored = rounded(v, -1) if policy.values == "int4" else v
    groups, out, begun, start = q.shape[0] // k.shape[0], [], 0, 0
    for size in sizes:
        end = begun + size
        sinks = range(min(policy.sinks, start))
        spare = [b for b in range(start // block) if b * block >= len(sinks)]
        mean_q = [q[:, i : min(i + block, end)].mean(1) for i in range(begun, end, block)]
        share = torch.zeros(len(spare), dtype=torch.float64)
        for g in range(q.shape[0] if spare else 0):
            mean_k = torch.stack([k[g // groups, b * block : (b + 1) * block].mean(0) for b in spare])
            share += sum((mean_k @ x[g] * DIM**-0.5).softmax(0) for x in mean_q)
        order = sorted(range(len(spare)), key=lambda i: -float(share[i]) if nearest else float(share[i]))
        picked = [s for i in sorted(order[: policy.picked]) for s in range(spare[i] * block, (spare[i] + 1) * block)]
        columns = [*sinks, *picked, *range(start, end)]
        front, first = len(sinks) + len(picked), len(columns) - size
        for t in range(size):
            row_start = first + t - t % block
            c = torch.arange(first + t + 1)
            tile = c - c % block
            near = (begun == 0) | (tile < front) | (row_start - (tile + block - 1) < policy.local)
            seen = c[near].tolist()
            at = [columns[c] for c in seen]
            exact = torch.tensor([not len(sinks) <= c < front for c in seen])[:, None]
            row = []
            for g in range(q.shape[0]):
                h = g // groups
                keys, values = torch.where(exact, k[h, at], hat[h, at]), torch.where(exact, v[h, at], stored[h, at])
                row.append((keys @ q[g, begun + t] * DIM**-0.5).softmax(0) @ values)
            out.append(torch.stack(row))
        last = max(policy.recent, policy.local) if end < sum(sizes) else policy.recent
        begun, start = end, max(start, end - last)
    return torch.stack(out)


def read_over_blocks(policy, q, k, v, sizes):
    """The store under a prompt in chunks: outputs ``[T, H, d]`` of one row."""
    store, outputs, start = policy.store(site()), [], 0
    store.prompt = sum(sizes)
    for n in sizes:
        cut = slice(start, start := start + n)
        keys, values = store.update(k[None, :, cut], v[None, :, cut])
        call = AttentionCall(site(), q[None, :, cut], keys, values, DIM**-0.5, is_causal=True)
        if (out := store.attend(call)) is None:
            out = call.attend()
            store.evict(call)
        outputs.append(out[0])
    return torch.cat(outputs), store


@pytest.mark.parametrize("more", ["", "values=int4,capacity=1000", "sinks=0,picked=9", "picked=0,local=300"])
def test_a_prompt_over_blocks_against_loops(small, more):
    """Sinks, picked blocks, a window: the formula; what is remembered afterwards is what a prompt at once leaves."""
    given = dict(part.split("=") for part in f"sinks=2,picked=1,local=60,{more}".split(",") if part)
    spec = ",".join(f"{name}={value}" for name, value in given.items())
    policy = parse(f"hcattention:codebooks={small},recent={RECENT},prompt=blocks,{spec}")
    sizes, books = [70, 400, 150], read_codebooks(str(small))[0][0].double()
    q, k, v = (x[0].double() for x in sequences(1, 2, sum(sizes), seed=6))
    got, store = read_over_blocks(policy, q, k, v, sizes)
    want = blocks_by_hand(policy, q, k, v, books, sizes)
    assert_close(got, want, 1e-9)
    assert store.tokens.coded == sum(sizes) - RECENT and store.tokens.codes.shape[3] >= int(given.get("capacity", 0))
    _, whole = read_over_blocks(parse(f"hcattention:codebooks={small},recent={RECENT},{spec}"), q, k, v, [sum(sizes)])
    assert torch.equal(store.tokens.codes[..., :600], whole.tokens.codes[..., :600])
    assert_close(store.tokens.stored_values(0, 600), whole.tokens.stored_values(0, 600), 1e-9)
    if not more:
        assert error(got, blocks_by_hand(policy, q, k, v, books, sizes, nearest=False)) > 1e-3
        assert error(got, blocks_by_hand(policy, q, k, v, books.roll(1, 1), sizes)) > 1e-3


def test_a_prompt_over_blocks_in_a_model(folder, tmp_path):
    """A window as long as the prompt reads it exactly; codebooks of a first chunk; saved, copied, and no padding."""
    model, ids = models.tiny("llama", torch.float64), tokens(2, 420)
    spec = f"hcattention:codebooks={folder},recent=3,sinks=2,values=int4"
    with manyheads.use(model):
        exact, all_of_it, few = (
            new_cache(model, parse(f"{spec},{more}"))
            for more in ("prompt=exact", "prompt=blocks,local=500", "prompt=blocks,local=8,picked=1,capacity=600")
        )
        for cache in (exact, all_of_it, few):
            prefill(model, ids, cache, chunk=150)
        save_cache(few, tmp_path / "cache.safetensors")
        again, copied = load_cache(tmp_path / "cache.safetensors", model), copy.deepcopy(few)
        want = step(model, ids[:, -1:], exact)
        assert_close(step(model, ids[:, -1:], all_of_it), want, 1e-9)
        mine = step(model, ids[:, -1:], few)
        assert error(mine, want) > 1e-3
        more = torch.cat([ids, tokens(2, 200, seed=3)], 1)  # after a decoded token the text goes on
        for cache in (few, again, copied):
            prefill(model, more[:, :500], cache, chunk=50)
        ends = [step(model, ids[:, -1:], cache) for cache in (few, again, copied)]
        assert_close(ends[1], ends[2], 1e-9)
        singles = [new_cache(model, parse(f"{spec},prompt=blocks,local=8,picked=1")) for _ in ids]
        for row, cache in zip(ids, singles, strict=True):
            prefill(model, row[None], cache, chunk=150)
        alone = torch.cat([step(model, row[None, -1:], cache) for row, cache in zip(ids, singles, strict=True)])
        assert_close(alone, mine, 1e-9)
        own = new_cache(model, parse("hcattention:centroids=16,prompt=blocks,local=8"))
        prefill(model, ids, own, chunk=150)
        assert all(store.tokens.centroids.shape == (2, 2, 4, 16, 2) for store in stores(own))
        masked = new_cache(model, parse(f"{spec},prompt=blocks,local=8"))
        for store in stores(masked):
            store.prompt = 300
        mask = torch.ones(2, 300, dtype=torch.long)
        mask[0, :5] = 0
        model(input_ids=ids[:, :150], attention_mask=mask[:, :150], past_key_values=masked)
        with pytest.raises(UserError, match="no padding"):
            model(input_ids=ids[:, 150:300], attention_mask=mask, past_key_values=masked)
    with manyheads.use(model, f"{spec},prompt=blocks,local=8,picked=1"):
        made = model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=150)
    assert made.shape == (2, 423)


def test_as_many_centroids_as_keys_and_all_of_the_mass_is_full_attention(tmp_path):
    """Codebooks that hold every key: generation is the model's, to rounding."""
    model, ids = models.tiny("llama", torch.float64), tokens(1, 60)
    made, want = greedy(model, ids, count=12)
    whole = torch.cat([ids, made], 1)
    write_codebooks(tmp_path, recipe.fit(model, [whole], groups=4, centroids=72, iterations=1), {"model": "tiny"})
    with manyheads.use(model, f"hcattention:codebooks={tmp_path},top_p=1.0,recent=1,sinks=0"):
        _, got = greedy(model, ids, forced=made)
    assert_close(got, want, 1e-9)
    with manyheads.use(model, f"hcattention:codebooks={tmp_path},top_p=0.5,recent=1,sinks=0"):
        assert error(greedy(model, ids, forced=made)[1], want) > 1e-2


def keys(draw_seed, count, dim=8, heads=2):
    made = torch.Generator().manual_seed(draw_seed)
    return torch.randn(1, heads, count, dim, generator=made, dtype=torch.float64)


def test_finer_codebooks_err_less():
    """Distortion falls with iterations, with more centroids and with more sub-vectors; few keys are met exactly."""
    k = keys(0, 600)

    def distortion(groups, centroids, iterations=10):
        books = product_codes.fit(k, groups, centroids, iterations=iterations)
        return float(product_codes.key_error(k, product_codes.encode(k, books), books).pow(2).mean())

    by_step = [distortion(4, 16, i) for i in range(6)]
    assert all(a >= b for a, b in pairwise(by_step)) and by_step[0] > 1.05 * by_step[5]
    by_size = [distortion(4, c) for c in (1, 4, 16, 64, 256)]
    assert all(a > b for a, b in pairwise(by_size))
    by_part = [distortion(g, 16) for g in (1, 2, 4, 8)]  # one codebook for all channels, to one for each
    assert all(a > b for a, b in pairwise(by_part))
    assert distortion(4, 600) == 0 and distortion(4, 599) > 0
    assert distortion(1, 1) == pytest.approx(float((k - k.mean(2, keepdim=True)).pow(2).sum(3).mean()))


def test_padding_and_other_rows_move_no_centroid():
    k = torch.cat([keys(1, 40), keys(2, 40)])
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :13] = False
    together = product_codes.fit(k, 4, 5, real=real)
    assert_close(together[1:], product_codes.fit(k[1:, :, 13:], 4, 5), FORMULA)
    assert_close(together[:1], product_codes.fit(k[:1], 4, 5), FORMULA)
    assert error(together[1:], product_codes.fit(k[1:], 4, 5)) > 1e-2


unit = st.floats(0.01, 0.99)


@given(seed=st.integers(0, 10**6), top_p=unit, more=unit, spread=st.floats(0.1, 8.0), count=st.integers(1, 60))
def test_the_kept_are_enough_and_no_more(seed, top_p, more, spread, count):
    """The smallest set of best-scored tokens with the mass; a larger share keeps all that a smaller one does."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, count, generator=made, dtype=torch.float64) * spread
    lse, p = x.logsumexp(2), x.softmax(2)

    def kept(share):
        return x >= product_codes.select(x, lse, torch.full_like(lse, share))[..., None]

    mine = kept(top_p)
    mass, last = (p * mine).sum(2), p.masked_fill(~mine, torch.inf).amin(2)
    assert bool((mass >= top_p - 1e-12).all()) and bool((mass - last < top_p + 1e-12).all())
    assert bool((p.masked_fill(~mine, torch.inf).amin(2) >= p.masked_fill(mine, -torch.inf).amax(2)).all())
    larger = kept(min(1.0, top_p + (1 - top_p) * more))
    assert bool((larger | ~mine).all())
    few = x >= product_codes.select(x, lse, 1 + count // 2)[..., None]
    assert bool((few.sum(2) == 1 + count // 2).all())


def bound_and_error(seed, top_p, renormalize, noise, spread, wrong=False):
    """How far attention over coded keys is from exact attention, and the most that it may be, for 3 heads."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, m, 8, generator=made, dtype=torch.float64) for n, m in ((3, 1), (3, 24), (3, 24)))
    books = product_codes.fit(k, 4, noise, iterations=3)
    codes = product_codes.encode(k, books)
    distance = product_codes.key_error(k, codes, books)
    hat = product_codes.decode(codes.roll(1, 3) if wrong else codes, books)
    exact, x = (reference.logits(q, keys, scale=spread) for keys in (k, hat))
    none = torch.zeros(1, 1, 1, 24, dtype=torch.bool)
    w = product_codes.weights(x, None, top_p, 0, none, renormalize)
    kept = (x.softmax(3) * (w > 0)).sum(3)
    off = ((exact.softmax(3) - w) @ v).norm(dim=3)
    most = spread * q.norm(dim=3) * distance.amax(2, keepdim=True)
    return off, product_codes.output_bound(most, kept, v.norm(dim=3).amax(2, keepdim=True), renormalize=renormalize)


CASE = {"seed": st.integers(0, 10**6), "top_p": st.floats(0.05, 1.0), "renormalize": st.booleans(),
        "noise": st.integers(1, 24), "spread": st.floats(0.01, 3.0)}  # fmt: skip


@given(**CASE)
def test_error_bound(seed, top_p, renormalize, noise, spread):
    """Quantisation error bounds the logits, these bound the weights, these and what is left out bound the output."""
    off, bound = bound_and_error(seed, top_p, renormalize, noise, spread)
    assert bool((off <= bound + 1e-12).all())


def test_error_bound_is_sharp_and_notices():
    """The worst case reaches it, half of it is broken, and so it is by codes of the next key."""
    e = 0.7
    for size in (2, 3):  # one token up, the others down, at the share that moves most; values point apart
        first = 1 / (1 + math.exp(e))
        x = torch.full((size,), math.log((1 - first) / (size - 1)), dtype=torch.float64)
        x[0] = math.log(first)
        shift = torch.full((size,), -e, dtype=torch.float64)
        shift[0] = e
        moved = (x + shift).softmax(0) - x.softmax(0)
        value = torch.ones(size, dtype=torch.float64)
        value[0] = -1
        bound = float(product_codes.output_bound(torch.tensor(e), 1.0, 1.0))
        assert float((moved * value).sum().abs()) == pytest.approx(bound, rel=1e-6)
    v = torch.tensor([1.0, -1.0])
    for renormalize, kept in ((True, torch.tensor([1.0, 0.0])), (False, torch.tensor([0.7, 0.0]))):
        off = float(((torch.tensor([0.7, 0.3]) - kept) * v).sum().abs())
        bound = float(product_codes.output_bound(torch.tensor(0.0), 0.7, 1.0, renormalize=renormalize))
        assert off == pytest.approx(bound)
    broken = [bound_and_error(seed, 1.0, True, 24, 0.5, wrong=True) for seed in range(5)]
    assert all(bool((off > bound).any()) for off, bound in broken)


def test_two_ways_to_read_a_share():
    """What several queries keep is what each would keep by the way of a single one."""
    x = keys(7, 30, dim=20)  # logits [1, 2, 30, 20]
    always = torch.zeros(1, 1, 30, 20, dtype=torch.bool)
    always[..., 3] = True
    for top_p, top_k in ((0.4, 0), (0.9, 0), (1.0, 0), (0.9, 5)):
        got = product_codes.weights(x, None, top_p, top_k, always, False)
        p = x.softmax(3)
        free = x.masked_fill(always, -torch.inf)
        lse = x.logsumexp(3).flatten(1)
        need = top_p - p[..., 3].flatten(1)
        lowest = product_codes.select(free.flatten(1, 2), lse, top_k or (need if top_p < 1 else need + torch.inf))
        want = p * ((free >= lowest.view(1, 2, 30, 1)) | always)
        assert_close(got, want, FORMULA)


def test_where_everything_lies(folder):
    """Keys are gone, values on the host; both counts are those of the storages that are held, shared ones once."""
    model = models.tiny("llama")
    spec = f"hcattention:codebooks={folder},recent=4,sinks=2"
    with manyheads.use(model):
        cache, full = prefilled(model, spec, tokens(2, 200)), prefilled(model, "full", tokens(2, 200))
        for t in range(3):
            assert cache.bytes() + cache.host_bytes() == caches.held(cache)
            step(model, tokens(2, 1, seed=t), cache)
        for store in stores(cache):
            assert store.tokens.coded == 199 and store.tokens.values.data.shape[1:] == (2, 2, 8)
            assert store.nbytes() < full.bytes() / 2 / 4 and nbytes(*store.offloaded) >= 199 * 2 * 2 * 8 * 4
            assert 0 < int(store.fetched.max()) < 199 and bool((store.mass >= 0.9 - 1e-5).all())
        eight = prefilled(model, f"{spec},values=fp8", tokens(2, 200))
        assert 3.5 < cache.host_bytes() / eight.host_bytes() <= 4
        four = prefilled(model, f"{spec},values=int4", tokens(2, 200))
        assert 6.5 < cache.host_bytes() / four.host_bytes() <= 8
        assert (
            error(step(model, tokens(2, 1), eight), step(model, tokens(2, 1), prefilled(model, spec, tokens(2, 200))))
            < 0.1
        )
    assert full.host_bytes() == 0


def test_a_text_without_codebooks():
    """Fitted on the prompt, once it has twice as many tokens as centroids; until then every token is exact."""
    model = models.tiny("llama")
    with manyheads.use(model):
        cache, full = (
            prefilled(model, "hcattention:centroids=16,recent=4", tokens(2, 20)),
            prefilled(model, "full", tokens(2, 20)),
        )
        for t in range(14):
            last = tokens(2, 1, seed=t)
            got, want = step(model, last, cache), step(model, last, full)
            if t < 12:
                assert_close(got, want)
        assert all(store.tokens.coded == 30 for store in stores(cache))
        assert all(store.tokens.centroids.shape == (2, 2, 4, 16, 2) for store in stores(cache))


def test_many_tokens_are_each_as_alone(folder):
    model = models.tiny("llama", torch.float64)
    spec, ids, more = f"hcattention:codebooks={folder},recent=3,sinks=1,top_p=0.7", tokens(2, 20), tokens(2, 9, seed=2)
    with manyheads.use(model):
        one, many = prefilled(model, spec, ids), prefilled(model, spec, ids)
        alone = torch.cat([step(model, more[:, i : i + 1], one) for i in range(9)], 1)
        assert_close(step(model, more, many), alone, 1e-9)
        assert_close(step(model, more[:, :1], many), step(model, more[:, :1], one), 1e-9)


@pytest.mark.parametrize("given", ["", "folder"])
@pytest.mark.parametrize("values", ["whole", "fp8", "int4"])
def test_a_prompt_in_chunks(folder, given, values):
    """Read exactly, from the host; what is remembered afterwards is bit for bit that of one forward."""
    model, ids = models.tiny("llama"), tokens(1, 40)
    spec = f"hcattention:recent=3,sinks=2,values={values}," + (f"codebooks={folder}" if given else "centroids=8")
    with manyheads.use(model):
        whole, pieces, full = (new_cache(model, parse(s)) for s in (spec, spec, "full"))
        prefill(model, ids, whole, chunk=100)
        prefill(model, ids, pieces, chunk=7)
        prefill(model, ids, full, chunk=7)
        for a, b in zip(stores(whole), stores(pieces), strict=True):
            assert a.tokens.coded == b.tokens.coded == 36
            assert_close(b.tokens.values.read().float(), a.tokens.values.read().float(), 1e-4)
        assert_close(step(model, ids[:, -1:], pieces), step(model, ids[:, -1:], whole), 1e-3)
        cache = new_cache(model, parse(spec))
        prefill(model, ids[:, :20], cache, chunk=7, progress=lambda _: None)
    with manyheads.use(model, spec):
        model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=7)


def test_batches_paddings_beams_and_rows(folder):
    model, spec = models.tiny("llama", torch.float64), f"hcattention:codebooks={folder},recent=3,sinks=2,top_p=0.8"
    caches.batch_equals_singles_padded_left(model, spec)
    caches.batch_equals_singles_padded_right(model, spec)
    caches.beams_equal_singles(model, spec)
    caches.rows_can_be_rearranged(model, spec)
    caches.continues_where_it_was(model, spec)
    caches.on_means_on(model, spec)


def test_two_conversations(folder):
    caches.two_conversations(models.tiny("llama"), f"hcattention:codebooks={folder},recent=3,sinks=2")


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_saved_copied_and_cropped(folder, name, tmp_path):
    """Bit-equal when it comes back; a copy is its own; crop restores while all is exact and is refused afterwards."""
    model, path = models.tiny(name), tmp_path / "cache.safetensors"
    spec = f"hcattention:codebooks={folder},recent=3,sinks=2,values=fp8"
    with manyheads.use(model):
        for length in (30, 3):
            cache = prefilled(model, spec, tokens(2, length))
            step(model, tokens(2, 1), cache)
            save_cache(cache, path)
            again, copied = load_cache(path, model), copy.deepcopy(cache)
            step(model, tokens(2, 1, seed=9), copied)
            goes = [
                torch.cat([step(model, x, c) for x in tokens(2, 4, seed=1).split([1, 1, 2], 1)], 1)
                for c in (again, cache)
            ]
            assert torch.equal(*goes)
        if name != "llama":  # its sliding layers are transformers' own
            return
        with pytest.raises(UserError, match="cannot be cropped"):
            prefilled(model, spec, tokens(2, 30)).crop(-1)
        short = prefilled(model, "hcattention", tokens(2, 9))
        step(model, tokens(2, 2), short)
        short.crop(-2)
        assert_close(
            step(model, tokens(2, 1), short), step(model, tokens(2, 1), prefilled(model, "full", tokens(2, 9)))
        )


def test_beside_others(folder):
    """Another strategy sees all slots, and what is not kept is hidden; the output is that without it."""
    model, spec, ids = (
        models.tiny("llama", torch.float64),
        f"hcattention:codebooks={folder},recent=3,top_p=0.7",
        tokens(2, 20),
    )
    with manyheads.use(model, spec):
        made, want = greedy(model, ids)
    with manyheads.use(model, spec, Watch()):
        assert_close(greedy(model, ids, forced=made)[1], want, 1e-9)
    with pytest.raises(UserError, match="renormalize"), manyheads.use(model, f"{spec},renormalize=False", Watch()):
        greedy(model, ids)


def test_refusals(folder, tmp_path):
    for spec, reason in {
        "top_p=0": "share", "top_k=-1": "top_k", "recent=0": "recent", "sinks=-1": "sinks", "groups=-1": "groups",
        "centroids=40000": "codebook", "prompt=blocks,local=0": "local",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=reason):
            parse(f"hcattention:{spec}")
    model = models.tiny("llama")
    with manyheads.use(model):
        for spec, reason in {
            f"codebooks={tmp_path}": "recipes.hcattention", "groups=3,centroids=4": "cannot be cut",
        }.items():  # fmt: skip
            with pytest.raises(UserError, match=reason):
                prefilled(model, f"hcattention:{spec}", tokens(1, 20))
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        read_codebooks(str(tmp_path))
    write_codebooks(tmp_path, {0: torch.zeros(2, 2, 3, 2)}, {"model": "other"})
    with manyheads.use(model):
        with pytest.raises(UserError, match="other keys"):
            prefilled(model, f"hcattention:codebooks={tmp_path},layers=0", tokens(1, 20))
        with pytest.raises(UserError, match="of other and have none"):
            prefilled(model, f"hcattention:codebooks={tmp_path},layers=1", tokens(1, 20))
    with manyheads.use(models.tiny("gpt_oss")), pytest.raises(UserError, match="learned sinks"):
        prefilled(models.tiny("gpt_oss"), "hcattention", tokens(1, 20))
    with pytest.raises(UserError, match="more text"):
        recipe.fit(model, [tokens(1, 20)])


def test_the_recipe(tmp_path):
    """From text to a folder that a spec names."""
    (tmp_path / "notes.txt").write_text("Names and numbers, one after the other.\n" * 200)
    out = tmp_path / "books"
    arguments = ["--text", str(tmp_path / "notes.txt"), "--out", str(out), "--centroids", "8", "--length", "32"]
    assert recipe.main([*arguments, "--tokens", "96", "--iterations", "2"]) == 0
    books, about = read_codebooks(str(out))
    assert about["tokens"] == 96 and about["centroids"] == 8 and about["model"] == "default"
    model, _ = manyheads.models.load_default()
    with manyheads.use(model):
        cache = new_cache(model, parse(f"hcattention:codebooks={out},recent=4"))
        step(model, tokens(1, 40), cache)
        step(model, tokens(1, 1), cache)
        assert all(store.tokens.coded == 37 for store in stores(cache)) and len(books) == len(stores(cache))
    with pytest.raises(SystemExit):
        recipe.main([*arguments[:2], "--out", str(out), "--centroids", "99999", "--tokens", "64"])


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["whole", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_kernels_and_host_agree(dtype, values):
    """Values read by the kernel from page-locked memory, and summed on the host: the same attention, copies too."""
    model = models.build("llama", head_dim=64).to("cuda", dtype)
    spec, ids = f"hcattention:centroids=16,recent=4,values={values}", tokens(2, 300).cuda()
    limit = {torch.float32: SAME, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    with manyheads.use(model):
        one, two = prefilled(model, spec, ids), prefilled(model, f"{spec},combine=host", ids)
        assert all(store.tokens.values.data.is_pinned() for store in stores(one))
        one = copy.deepcopy(one)
        for t in range(40):
            last = tokens(2, 1, seed=t).cuda()
            assert_close(step(model, last, one), step(model, last, two), limit)
        assert all(store.tokens.values.data.is_pinned() for store in stores(one))
        wrong = copy.deepcopy(one)
        for store in stores(wrong):
            store.tokens.values.data.copy_(store.tokens.values.data.roll(1, 0))
        assert error(step(model, ids[:, :1], wrong), step(model, ids[:, :1], one)) > 3 * limit
