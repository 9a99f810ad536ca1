# SPDX-License-Identifier: Apache-2.0
"""ThinK: the channels that stay, what attention over them gives, and the bytes of a cache of thinner keys."""

import copy
import math

import pytest
import torch

import manyheads
from caches.formula import DIM, drive, sequences
from manyheads import UserError, parse
from manyheads.integrations.transformers import new_cache, prefill
from oracles import caches, models
from tolerance import CLOSE, FORMULA, SAME, assert_close, is_far


def by_hand(q, k, v, prompt, keep, window, recent, *, norms=True):
    """One row in float64 loops: ``q [H, S, d]``, ``k, v [2, S, d]``; the outputs after the prompt, and channels."""
    groups, outputs, chosen = len(q) // len(k), [], []
    for h in range(len(k)):
        scores = []
        for i in range(DIM):
            asked = [
                sum(float(q[g, t, i]) ** 2 for t in range(prompt - window, prompt))
                for g in range(h * groups, (h + 1) * groups)
            ]
            scores.append(sum(asked) / groups * (sum(float(x) ** 2 for x in k[h, :prompt, i]) if norms else 1.0))
        chosen.append(sorted(sorted(range(DIM), key=lambda i: -scores[i])[:keep]))
    for t in range(prompt, q.shape[1]):
        for head in range(len(q)):
            h, keys = head // groups, k[head // groups, : t + 1].clone()
            for i in set(range(DIM)) - set(chosen[h]):
                keys[: max(0, prompt - recent), i] = 0.0
            outputs.append((keys @ q[head, t] / math.sqrt(DIM)).softmax(0) @ v[h, : t + 1])
    return torch.stack(outputs).view(-1, len(q), DIM), chosen


SIZES = [11, 1, 1, 4, 1]


def outputs_of(policy, heads=4, padding=None):
    q, k, v = (x.double() for x in sequences(2, heads, sum(SIZES), seed=4))
    out, _, store = drive(parse(policy), q, k, v, SIZES, padding)
    return out, store, (q, k, v)


@pytest.mark.parametrize(
    ("channels", "window", "recent", "heads", "padding"),
    [(0.5, 3, 0, 4, None), (0.34, 5, 2, 2, [0, 5]), (0.85, 1, 4, 8, [2, 0]), (0.5, 3, 3, 8, [0, 5])],
)
def test_against_loops(channels, window, recent, heads, padding):
    spec = f"think:channels={channels},window_size={window},recent_size={recent}"
    out, store, (q, k, v) = outputs_of(spec, heads, padding)
    for b, skip in enumerate(padding or [0, 0]):
        rows = (x[b, :, skip:] for x in (q, k, v))
        want, chosen = by_hand(*rows, SIZES[0] - skip, round(channels * DIM), window, recent)
        assert_close(out[b, SIZES[0] :], want, FORMULA)
        assert store._channels[b].tolist() == chosen


def test_control_of_the_loops():
    out, _, (q, k, v) = outputs_of("think:channels=0.5,window_size=3,recent_size=2", 8)
    rows = (q[0], k[0], v[0], SIZES[0])
    assert_close(out[0, SIZES[0] :], by_hand(*rows, 3, 3, 2)[0], FORMULA)
    wrong_ones = [(4, 3, 2), (3, 8, 2), (3, 3, 0), (3, 3, 5)]
    for wrong in (by_hand(*rows, 3, 3, 2, norms=False), *(by_hand(*rows, *args) for args in wrong_ones)):
        with pytest.raises(AssertionError):
            assert_close(out[0, SIZES[0] :], wrong[0], FORMULA)


def test_all_channels_are_the_base():
    model, ids = models.tiny("llama"), models.tokens(2, 24)
    for base in ("full", "snapkv(window_size=4)"):
        more = "" if base == "full" else ",budget=0.5"
        with manyheads.use(model, f"think:base={base},channels=1.0,window_size=8{more}"):
            _, got = caches.greedy(model, ids)
        with manyheads.use(model, base.replace("(", ":").replace(")", "") + more):
            _, want = caches.greedy(model, ids)
        assert torch.equal(got, want)


def test_channels_are_chosen_of_the_tokens_that_the_base_keeps():
    model, ids = models.tiny("llama", torch.float64), models.tokens(2, 30)
    spec = "snapkv(window_size=4,kernel_size=3)"
    with manyheads.use(model):
        thin = caches.stores(caches.prefilled(model, f"think:base={spec},budget=0.4,channels=0.5,recent_size=0", ids))
        base = caches.stores(caches.prefilled(model, "snapkv:window_size=4,kernel_size=3,budget=0.4", ids))
    for mine, theirs in zip(thin, base, strict=True):
        if mine.site.layer == 0:
            assert torch.equal(mine.live.positions(), theirs.live.positions())
            kept = mine.keys != 0
            assert_close(mine.keys, theirs.keys * kept, SAME)
            assert torch.equal(mine.values, theirs.values)
        assert mine._pruned.shape[-1] == 4 and mine.keys.shape == theirs.keys.shape


def test_bytes_are_those_of_thinner_keys():
    model, ids = models.tiny("llama"), models.tokens(2, 60)
    with manyheads.use(model):
        cache, full = (
            caches.prefilled(model, "think:channels=0.5,recent_size=8", ids),
            caches.prefilled(model, "full", ids),
        )
        for t in range(3):
            assert cache.bytes() == caches.held(cache)
            caches.step(model, models.tokens(2, 1, seed=t), cache)
        width = 8
        numbers = 60 * (width // 2 + width) * 4 + width // 2 * 2  # and the numbers of the channels
        numbers += 8 * (width * 4 + 4)  # whole keys of the last tokens, and where they are
        fresh = caches.prefilled(model, "think:channels=0.5,recent_size=8", ids)
        queries = sum(x.q.nbytes + x.positions.nbytes for s in caches.stores(fresh) if (x := s._queries) is not None)
        assert fresh.bytes() - queries == 2 * 2 * 2 * numbers
        assert queries == 0 and fresh.bytes() < 0.85 * full.bytes()


@pytest.mark.parametrize("oracle", [caches.batch_equals_singles_padded_left, caches.batch_equals_singles_padded_right,
                                    caches.rows_can_be_rearranged, caches.two_conversations, caches.on_means_on,
                                    caches.continues_where_it_was])  # fmt: skip
def test_oracles(oracle):
    oracle(models.tiny("llama", torch.float64), "think:channels=0.5,window_size=4,recent_size=2")


def test_protected_tokens_stay():
    caches.protected_stay(models.tiny("llama", torch.float64), "snapkv:budget=0.5,window_size=3,kernel_size=3")
    model, ids = models.tiny("llama", torch.float64), models.tokens(2, 24)
    spec = "think:base=snapkv(window_size=3,kernel_size=3),budget=0.3,protect=4-9"
    with manyheads.use(model):
        positions = caches.stores(caches.prefilled(model, spec, ids))[0].live.positions()
    assert all(set(range(4, 10)) <= set(head) for row in positions.tolist() for head in row)


def test_a_copy_and_a_saved_state_go_on_alike():
    model, ids = models.tiny("llama", torch.float64), models.tokens(2, 20)
    with manyheads.use(model):
        cache = caches.prefilled(model, "think:channels=0.5,recent_size=8", ids)
        other = caches.prefilled(model, "think:channels=0.5,recent_size=8", models.tokens(2, 20, seed=9))
        for mine, theirs in zip(caches.stores(cache), caches.stores(other), strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        for t in range(3):
            last = models.tokens(2, 1, seed=t)
            assert_close(caches.step(model, last, other), caches.step(model, last, cache), CLOSE)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("think:channels=0", "channels"), ("think:channels=1.5", "channels"), ("think:window_size=0", "window_size"),
        ("think:recent_size=-1", "recent_size"),
        ("think:base=snapkv,schedule=chunk", "prefill"), ("think:base=fireq", "way of"), ("think:base=hedge", "way of"),
    ],
)  # fmt: skip
def test_refuses(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)


def test_layers_with_a_sliding_window_are_as_they_were():
    """What a window drops must leave every form in which keys are held: here nothing is pruned, so nothing differs."""
    model = models.tiny("gemma3_text", torch.float64)
    kinds, window = model.config.layer_types, model.config.sliding_window
    ids = models.tokens(2, 6 * window)
    found = {}
    for kind in set(kinds):
        at = "+".join(str(i) for i, x in enumerate(kinds) if x == kind)
        cut = 4 * window
        with manyheads.use(model), torch.no_grad():
            cache = new_cache(model, parse(f"think:channels=0.5,recent_size=2,layers={at}"))
            prefill(model, ids[:, : cut + 1], cache)
            out = [
                model(input_ids=x, past_key_values=cache).logits for x in ids[:, cut:].split([5, 1, 2 * window - 6], 1)
            ]
        found[kind] = torch.cat(out, 1)
    with torch.no_grad():
        want = model(input_ids=ids).logits[:, 4 * window :]
    assert_close(found["sliding_attention"], want, SAME)
    assert is_far(found["full_attention"], want)
