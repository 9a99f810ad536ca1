# SPDX-License-Identifier: Apache-2.0
"""Attention Matching: keys, weights and values of one head after another, against least squares in float64."""

import math

import pytest
import torch

import manyheads
from caches.formula import DIM, drive, sequences
from manyheads import UserError, parse
from oracles import caches, models
from tolerance import CLOSE, assert_close, error

PROMPT, WINDOW = 24, 10
SIZES = [PROMPT, 1, 3]


def by_hand(q, k, v, room, *, fixed=(), iterations=2, ridge=1e-4, mass=True, values=True, group=True):
    """One row, ``q [H, S, d]``, ``k, v [2, S, d]``: what each head holds, its betas and values, and later outputs."""
    groups, made = len(q) // len(k), []
    for h in range(len(k)):
        heads = range(h * groups, (h + 1) * groups if group else h * groups + 1)
        asked = torch.cat([q[g, PROMPT - WINDOW : PROMPT] for g in heads])
        logits = asked @ k[h, :PROMPT].T / math.sqrt(DIM)
        e = (logits - logits.max(1, keepdim=True).values).exp()
        p = e / e.sum(1, keepdim=True)
        rms = (p**2).mean(0).sqrt().tolist()
        held = sorted(sorted(range(PROMPT), key=lambda s: (s in fixed, rms[s], s), reverse=True)[:room])
        free = [i for i, s in enumerate(held) if s not in fixed]
        beta = torch.zeros(room, dtype=torch.float64)
        a, b = e[:, held][:, free], e.sum(1) - e[:, [s for s in held if s in fixed]].sum(1)
        if mass:
            w = ridged(a, b[:, None], ridge)[:, 0].clamp(math.exp(-3), math.exp(3))
            for _ in range(iterations):
                w = (w - a.T @ (a @ w - b) / torch.linalg.matrix_norm(a, 2) ** 2).clamp(math.exp(-3), math.exp(3))
            beta[free] = w.log()
        x = (logits[:, held] + beta).softmax(1)
        own = v[h, held].clone()
        if values:
            stay = [i for i in range(room) if i not in free]
            own[free] = ridged(x[:, free], p @ v[h, :PROMPT] - x[:, stay] @ own[stay], ridge)
        made.append((held, beta, own))
    outputs = []
    for t in range(PROMPT, sum(SIZES)):
        for head in range(len(q)):
            held, beta, own = made[head // groups]
            keys, late = k[head // groups], list(range(PROMPT, t + 1))
            x = keys[[*held, *late]] @ q[head, t] / math.sqrt(DIM) + torch.cat([beta, torch.zeros(len(late))])
            outputs.append(x.softmax(0) @ torch.cat([own, v[head // groups, late]]))
    return made, torch.stack(outputs).view(-1, len(q), DIM)


def ridged(a, b, ridge):
    gram = a.T @ a
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), a.T @ b)


def run(spec, heads=4, padding=None, seed=4):
    q, k, v = (x.double() for x in sequences(2, heads, sum(SIZES), seed=seed))
    out, _, store = drive(parse(f"attention_matching:window_size={WINDOW},{spec}"), q, k, v, SIZES, padding)
    return out, store, (q, k, v)


@pytest.mark.parametrize(
    ("spec", "heads", "fields"),
    [
        ("budget=8", 4, {}), ("budget=0.25", 8, {}), ("budget=9,fit_values=false", 2, {"values": False}),
        ("budget=9,fit_mass=false", 4, {"mass": False}),
        ("budget=7,iterations=0,ridge=0.01", 4, {"iterations": 0, "ridge": 0.01}),
        ("budget=10,sinks=2,recent=3", 8, {"fixed": (0, 1, 21, 22, 23)}),
        ("budget=10,protect=4-6", 4, {"fixed": (4, 5, 6)}),
    ],
)  # fmt: skip
def test_against_loops(spec, heads, fields):
    out, store, (q, k, v) = run(spec, heads)
    for b in range(2):
        made, want = by_hand(q[b], k[b], v[b], store.live.size - 4, **fields)
        for h, (held, beta, own) in enumerate(made):
            assert store.live.positions()[b, h].tolist() == [*held, *range(PROMPT, sum(SIZES))]
            if fields.get("mass", True):
                assert_close(store.live.extras["beta"][b, h, : len(held), 0], beta, CLOSE)
            assert_close(store.live.values[b, h, : len(held)], own, CLOSE)
        assert_close(out[b, PROMPT:], want, CLOSE)


def test_control_of_the_loops():
    out, store, (q, k, v) = run("budget=8", 8)
    rows, room = (q[0], k[0], v[0]), store.live.size - 4
    assert_close(out[0, PROMPT:], by_hand(*rows, room)[1], CLOSE)
    for wrong in ({"group": False}, {"mass": False}, {"values": False}, {"fixed": (0,)}, {"ridge": 0.1}):
        with pytest.raises(AssertionError):
            assert_close(out[0, PROMPT:], by_hand(*rows, room, **wrong)[1], CLOSE)


def test_it_matches_what_it_was_fitted_to_better_than_eviction_does():
    """Over the reference queries the output is nearer to that of all keys with every part of the fit."""
    q, k, v = (x.double() for x in sequences(1, 4, PROMPT, seed=2))
    want, errors = None, []
    for spec in ("fit_mass=false,fit_values=false", "fit_values=false", "budget=8"):
        spec = spec if "budget" in spec else f"budget=8,{spec}"
        _, _, store = drive(parse(f"attention_matching:window_size={PROMPT},{spec}"), q, k, v, [PROMPT])
        beta = store.live.extras.get("beta", torch.zeros(1, 2, 8, 1, dtype=torch.float64))
        asked = q.unflatten(1, (2, 2)).flatten(2, 3)
        want = (asked @ k.mT / math.sqrt(DIM)).softmax(-1) @ v if want is None else want
        got = (asked @ store.live.keys.mT / math.sqrt(DIM) + beta.mT).softmax(-1) @ store.live.values
        errors.append(error(got, want))
    assert errors[2] < 0.7 * errors[0] and errors[2] < errors[1]


@pytest.mark.parametrize("oracle", [caches.batch_equals_singles_padded_left, caches.batch_equals_singles_padded_right,
                                    caches.rows_can_be_rearranged, caches.padding_is_never_read,
                                    caches.two_conversations, caches.protected_stay])  # fmt: skip
def test_oracles(oracle):
    oracle(models.tiny("llama", torch.float64), "attention_matching:budget=0.6,window_size=4,sinks=1")


def test_a_budget_of_one_is_the_whole_cache():
    model, ids = models.tiny("llama"), models.tokens(2, 24)
    _, want = caches.greedy(model, ids)
    with manyheads.use(model, "attention_matching:budget=1.0"):
        _, got = caches.greedy(model, ids)
    assert torch.equal(got, want)


@pytest.mark.parametrize("fields", ["window_size=0", "ridge=0", "iterations=-1", "schedule=chunk"])
def test_refuses(fields):
    with pytest.raises(UserError, match="attention_matching"):
        parse(f"attention_matching:{fields}")
