# SPDX-License-Identifier: Apache-2.0
"""A fraction of a short prompt may be less than a strategy must protect: then the prompt is kept whole."""

import dataclasses
import pkgutil
from dataclasses import dataclass

import pytest
import torch

import manyheads
from manyheads import caches as wing
from manyheads import parse
from manyheads.attention.budget import keep_counts, keep_limit
from manyheads.caches._store import PolicyStore
from manyheads.caches.snapkv import SnapKV
from oracles import caches, models
from tolerance import CLOSE, SAME, assert_close, error

FIELDS = {
    "fireq": "base=snapkv,",
    "hedge": "bits=none,whole=0,",
    "kvzip": "instruct=false,",
}  # FireQ stores 4 bits always
ONE_LENGTH = {"kvzip"}  # padded rows are refused
TRAINED = {"attention_gate", "fastkvzip", "gist", "kvzap"}  # no spec says what was trained
SLUGS = [name for _, name, _ in pkgutil.iter_modules(wing.__path__) if not name.startswith("_") and name not in TRAINED]
SIZED = [
    s for s in SLUGS if {"budget", "schedule"} <= {f.name for f in dataclasses.fields(parse(s))}
    and s != "full" and getattr(parse(s), "has_budget", True)
]  # fmt: skip
MADE, LONG = 30, 200
every = pytest.mark.parametrize("slug", SIZED)


def spec(slug, budget):
    return f"{slug}:{FIELDS.get(slug, '')}budget={budget}"


@pytest.fixture(scope="module")
def llama():
    return models.build("llama", dtype=torch.float64)


def under(model, strategy, ids, mask=None, **how):
    with manyheads.use(model, strategy):
        return caches.greedy(model, ids, mask, MADE, **how)


_whole = {}  # of the same tokens with all of the cache, by model and shape


def keeps_what_it_protects(model, strategy, ids):
    """Until the text is longer than what is protected, the logits are those of the full cache."""
    if (key := (id(model), ids.shape)) not in _whole:
        _whole[key] = under(model, "full", ids)
    made, want = _whole[key]
    _, got = under(model, strategy, ids, forced=made)
    assert bool(got.isfinite().all())
    whole = max(0, min(MADE, parse(strategy).protected - ids.shape[1] + 1))  # logits of as many tokens as stay
    assert_close(got[:, :whole], want[:, :whole], SAME)


@every
@pytest.mark.parametrize(("length", "budget"), [(1, 0.05), (2, 0.25), (5, 0.05), (34, 0.25)])
def test_a_short_prompt_is_kept_whole(llama, slug, length, budget):
    ids = models.tokens(2, length)
    if slug == "fireq":
        assert bool(under(llama, spec(slug, budget), ids)[1].isfinite().all())
    else:
        keeps_what_it_protects(llama, spec(slug, budget), ids)


@every
def test_a_short_row_of_a_batch(llama, slug):
    ids, mask = models.tokens(2, 34), torch.ones(2, 34, dtype=torch.long)
    mask[1, :29] = 0  # five are left: the scores of two tokens tie under keydiff
    if slug in ONE_LENGTH:
        with pytest.raises(manyheads.UserError, match="give one length"):
            under(llama, spec(slug, 0.05), ids, mask)
        return
    made, logits = under(llama, spec(slug, 0.05), ids, mask)
    _, alone = under(llama, spec(slug, 0.05), ids[1:, 29:], forced=made[1:])
    assert_close(logits[1:], alone, SAME)


@every
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_a_long_prompt_is_evicted_to_its_budget(llama, slug, budget):
    with manyheads.use(llama):
        cache = caches.prefilled(llama, spec(slug, budget), models.tokens(1, LONG))
    held = torch.stack([(store.live.positions() >= 0).sum(-1).double().mean() for store in caches.stores(cache)])
    assert abs(float(held.mean()) - max(budget * LONG, parse(spec(slug, budget)).protected)) <= 1


class Cutting(PolicyStore):
    """Wrong: a fraction cuts into what is protected."""

    def _limits(self, counts):
        return keep_counts(self.policy.budget, counts), keep_limit(self.policy.budget, self.live.seen)


@dataclass(frozen=True, kw_only=True)
class Cut(SnapKV):
    def store(self, site):
        return Cutting(self, site)


def test_control(llama):
    ids = models.tokens(2, 5)
    keeps_what_it_protects(llama, SnapKV(budget=0.25), ids)
    with pytest.raises(AssertionError):
        keeps_what_it_protects(llama, Cut(budget=0.25), ids)
    plain = under(llama, "full", models.tokens(1, 34))
    _, got = under(llama, "auto:budget=0.05,whole=0", models.tokens(1, 34), forced=plain[0])
    assert error(got, plain[1]) > 1e-2  # 34 tokens are more than 20


def test_what_stays_short_is_not_rounded_and_what_grows_is_packed(llama):
    """30 tokens and 30 more: with a bound of 60 nothing is encoded; with one of 45 all of it is, from there on."""
    ids = models.tokens(1, 30)
    made, want = under(llama, "full", ids)
    assert_close(under(llama, "auto:budget=0.05,bits=fp8,whole=60", ids, forced=made)[1], want, CLOSE)
    _, got = under(llama, "auto:budget=0.05,bits=fp8,whole=45", ids, forced=made)
    assert_close(got[:, :16], want[:, :16], CLOSE)
    assert error(got[:, 16:], want[:, 16:]) > 1e-4


@pytest.mark.parametrize("bits", ["fp8", "none"])
def test_auto_keeps_a_chat_prompt_whole(llama, bits):
    """Up to ``whole`` tokens, row by row; longer ones are cut to the budget. In 16 bits nothing changes at all."""
    strategy, least = f"auto:budget=0.05,whole=40,bits={bits}", 20
    ids, mask = models.tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[1, :20] = mask[2, :19] = 0  # 60, 40 and 41 tokens
    with manyheads.use(llama):
        cache = caches.prefilled(llama, strategy, ids, attention_mask=mask)
        held = torch.stack([(store.live.positions() >= 0).sum(-1).double() for store in caches.stores(cache)])
    assert held.mean((0, 2)).tolist() == [least, 40, least]
    made, want = under(llama, "full", ids[1:2, 20:])
    _, alone = under(llama, strategy, ids[1:2, 20:], forced=made)
    assert (error(alone, want) == 0) == (bits == "none")


def test_slots_that_cannot_hold_the_protected_tokens_are_refused():
    for slug in SIZED:
        least = parse(slug).protected
        if least > 1:
            with pytest.raises(manyheads.UserError, match=f"a budget of {least - 1} slots cannot hold its {least}"):
                parse(spec(slug, least - 1))


@pytest.mark.parametrize(("given", "length", "says"), [
    ("keydiff:budget=0.25", 34, "keeps 9 of 34"), ("h2o:budget=0.1", 60, "keeps 6 of 60"),
    ("keydiff:budget=0.25", 64, ""), ("keydiff:budget=9", 34, ""), ("keydiff:budget=1.0", 8, ""),
    ("fireq:base=keydiff,budget=0.25", 34, ""),
])  # fmt: skip
def test_few_tokens_of_a_prompt_are_not_kept_without_a_word(llama, given, length, says, recwarn):
    """Once, at the line that runs the model; a number of tokens is a choice, and as many as this are enough."""
    with manyheads.use(llama, given):
        caches.greedy(llama, models.tokens(1, length), None, 3)
    said = [w for w in recwarn if "tokens of this prompt" in str(w.message)]
    assert [says in str(w.message) for w in said] == [True] * bool(says)
    assert all("manyheads" not in w.filename.split("/src/")[-1] for w in said)
