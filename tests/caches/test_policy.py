# SPDX-License-Identifier: Apache-2.0
"""What every eviction rests on, by hand: which slots stay, when, what is protected, and the papers' defaults."""

import dataclasses

import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.attention.padded import PaddedCache
from manyheads.caches._evict import keep_best
from manyheads.caches._strategy import EvictionStrategy
from manyheads.caches._view import CacheView, QueryWindow
from manyheads.call import Site
from manyheads.integrations.transformers import new_cache
from oracles import models
from oracles.caches import stores
from tolerance import CLOSE, is_close

# Fields that are the paper's, with the paper's values; common ones are written once.
COMMON = {"budget": 0.5, "schedule": "prefill", "sinks": 0, "recent": 0}
DEFAULTS = {
    "adakv": {"recent": 32, "base": "snapkv", "alpha": 0.2},
    "expected_attention": {"sinks": 4, "future": 512, "use_covariance": True, "use_vnorm": True, "epsilon": 0.0},
    "h2o": {"schedule": "step", "recent_share": 0.5},
    "keydiff": {},
    "knorm": {},
    "lagkv": {"sinks": 16, "lag_size": 128},
    "pyramidkv": {"recent": 32, "base": "snapkv", "beta": 20.0},
    "random": {"seed": 0},
    "snapkv": {"recent": 32, "window_size": 32, "kernel_size": 7},
    "streaming_llm": {"schedule": "step", "sinks": 4},
    "tova": {"schedule": "step"},
}


@pytest.mark.parametrize("slug", DEFAULTS)
def test_defaults_are_the_papers(slug):
    strategy = parse(slug)
    found = {
        f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy) if f.name not in ("layers", "protect")
    }
    assert found == COMMON | DEFAULTS[slug]
    assert (
        strategy.layers is None
        and not strategy.protect
        and strategy.has_budget
        and strategy.protected == found["sinks"] + found["recent"]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores(EvictionStrategy):
    """Scores that are given."""

    given: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    heads: torch.Tensor | None = dataclasses.field(default=None, compare=False)

    def score(self, view):
        return self.given

    def head_budgets(self, view, scores, budgets):
        return self.heads


def setting(heads=2, size=9, batch=2, padding=(0, 0), dropped=None):
    """Slots whose keys say where they come from, and what a policy sees of them."""
    keys = torch.arange(float(batch * heads * size)).view(batch, heads, size, 1)
    slots = PaddedCache.empty(keys[:, :, :0], keys[:, :, :0])
    slots.update(keys, -keys)
    if any(padding):
        slots.mark(torch.stack([torch.arange(size) >= n for n in padding]))
    columns = slots.columns()
    positions = torch.where(columns >= 0, columns - torch.tensor(padding)[:, None, None], -1)
    counts = size - torch.tensor(padding)
    site = Site("x", 0, 0, "self", True, peers=(0,))
    view = CacheView(slots.keys, slots.values, positions, counts, None, 1.0, None, None, site)
    return slots, view


def by_hand(view, scores, budgets, sinks, recent):
    """Positions that stay, by sorting Python's tuples: protected first, then by score, of equal ones the newer."""
    kept = []
    for b in range(view.positions.shape[0]):
        for h in range(view.positions.shape[1]):
            count = int(view.counts[b])
            real = [int(p) for p in view.positions[b, h] if p >= 0]
            where = {int(p): n for n, p in enumerate(view.positions[b, h].tolist()) if p >= 0}
            safe = {p for p in real if p < sinks or p >= count - recent}
            ranked = sorted(real, key=lambda p: (p in safe, float(scores[b, h, where[p]]), p), reverse=True)
            kept.append(sorted(ranked[: budgets[b][h]]))
    return kept


def left(slots, padding):
    rows = []
    for b, n in enumerate(padding):
        rows += [sorted(int(c) - n for c in row if c >= 0) for row in slots.columns()[b]]
    return rows


@pytest.mark.parametrize("padding", [(0, 0), (0, 3)])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 1), (0, 3), (1, 0)])
@pytest.mark.parametrize("share", [1.0, 0.5, 1.3])
def test_the_best_stay(padding, sinks, recent, share):
    for seed in range(4):
        slots, view = setting(padding=padding)
        scores = torch.randint(0, 4, (2, 2, 9), generator=torch.Generator().manual_seed(seed)).float()  # many ties
        policy = Scores(budget=0.5, sinks=sinks, recent=recent, given=scores)
        counts = torch.tensor([5, 4])
        ragged = keep_best(policy, view, slots, counts, 5, share)
        per_row = [min(max(round(int(n) * share), sinks + recent) if share != 1 else int(n), int(view.counts[b]))
                   for b, n in enumerate(counts)]  # fmt: skip
        assert left(slots, padding) == by_hand(view, scores, [[n, n] for n in per_row], sinks, recent)
        assert ragged == (share != 1.0 and per_row[0] != per_row[1])
        kept = slots.columns()
        assert torch.equal(slots.keys[..., 0][kept >= 0], (torch.arange(4.0).view(2, 2, 1) * 9 + kept)[kept >= 0])
        assert torch.equal(slots.values[kept >= 0], -slots.keys[kept >= 0])


def test_heads_with_budgets_of_their_own():
    slots, view = setting()
    scores = torch.randint(0, 5, (2, 2, 9), generator=torch.Generator().manual_seed(0)).float()
    heads = torch.tensor([[2, 7], [30, 0]])
    policy = Scores(budget=0.5, sinks=1, recent=1, given=scores, heads=heads)
    assert keep_best(policy, view, slots, torch.tensor([4, 4]), 4, 1.0)
    # At least the protected tokens, and no more than the row has.
    assert left(slots, (0, 0)) == by_hand(view, scores, [[2, 7], [9, 2]], 1, 1)
    even, view = setting()
    same = torch.full((2, 2), 4)
    assert not keep_best(Scores(budget=0.5, given=scores, heads=same), view, even, torch.tensor([4, 4]), 4, 1.0)
    assert even.size == 4


def test_query_heads_of_a_group_score_together():
    """More scores than stored heads: the mean of those that share a head."""
    slots, view = setting(heads=1)
    scores = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0))
    keep_best(Scores(budget=0.5, given=scores), view, slots, torch.tensor([4, 4]), 4, 1.0)
    assert left(slots, (0, 0)) == by_hand(view, scores.mean(1, keepdim=True), [[4], [4]], 0, 0)


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("prefill", {(1, 9, 9), (1, 1, 1)}),
        ("chunk", {(1, 9, 9), (1, 1, 1), (2, 2, 2), (3, 4, 3), (9, 2, 9)}),
        ("turn", {(1, 9, 9), (1, 1, 1), (2, 2, 2), (3, 4, 3), (9, 2, 9)}),
        ("step", {(1, 9, 9), (1, 1, 1), (2, 2, 2), (2, 1, 1), (3, 4, 3), (9, 1, 3), (9, 1, 4), (9, 2, 9)}),
        (4, {(1, 9, 9), (1, 1, 1), (9, 1, 4), (9, 2, 9)}),
    ],
)  # fmt: skip
def test_when_to_evict(schedule, due):
    """Forward, its tokens, and tokens since the last eviction."""
    policy = Scores(schedule=schedule)
    every = {(1, 9, 9), (1, 1, 1), (2, 2, 2), (2, 1, 1), (3, 4, 3), (9, 1, 3), (9, 1, 4), (9, 2, 9)}
    assert {at for at in every if policy.should_evict(*at)} == due


def test_what_is_refused_and_what_a_policy_says_of_itself():
    for wrong in (
        {"schedule": 0},
        {"schedule": "never"},
        {"schedule": -3},
        {"sinks": -1},
        {"recent": -1},
        {"budget": 0},
    ):
        with pytest.raises(UserError):
            Scores(**wrong)
    with pytest.raises(UserError, match="a budget of 4 slots cannot hold its 5 protected tokens"):
        Scores(budget=4, sinks=2, recent=3)
    Scores(budget=5, sinks=2, recent=3).check(5)
    Scores(budget=0.01, sinks=2, recent=3)  # a fraction never cuts into them
    plain = Scores()
    assert (plain.window, plain.record, plain.gathers, plain.codec, plain.codec_window) == (0, 0, False, None, 0)
    assert parse("snapkv").record == parse("snapkv").window == 32 and parse("h2o").record == 2**31
    assert not plain.selects(Site("x", 0, 0, "self", False)) and not plain.selects(Site("x", 0, None, "self", True))
    assert plain.selects(Site("x", 0, 0, "self", True)) and not plain.selects(Site("x", 0, 0, "cross", True))
    assert not Scores(layers=(1,)).selects(Site("x", 0, 0, "self", True))


@pytest.mark.parametrize("padding", [(0, 0), (0, 2), (3, 1)])
def test_the_last_queries_of_rows_that_end_apart(padding):
    slots, _ = setting(size=5, padding=padding)
    q = torch.arange(2.0 * 2 * 3).view(2, 2, 3, 1)
    window = QueryWindow.of(q, slots)
    assert window.positions.tolist() == [[2 - n, 3 - n, 4 - n] if n < 3 else [-1, 0, 1] for n in padding]
    assert window.last(3) is window and window.last(9) is window
    two = window.last(2)
    assert torch.equal(two.q, q[:, :, 1:]) and torch.equal(two.positions, window.positions[:, 1:])
    turned = QueryWindow(q, torch.tensor([[5, 9, 7], [-1, 3, -1]])).last(2)  # by position, in their order
    assert turned.positions.tolist() == [[9, 7], [3, -1]] or turned.positions[0].tolist() == [9, 7]
    joined = window.join(window)
    assert joined.q.shape == (2, 2, 6, 1) and joined.positions.shape == (2, 6)
    flipped = window.reorder(torch.tensor([1, 0]))
    assert torch.equal(flipped.q, q.flip(0)) and torch.equal(flipped.positions, window.positions.flip(0))


def test_what_forks_share_is_made_once():
    _, view = setting()
    made = []
    for _ in range(2):
        assert float(view.once("a", lambda v: made.append(v) or torch.ones(()))) == 1
    other = dataclasses.replace(view, state={})
    assert float(other.once("a", lambda v: torch.zeros(()))) == 1 and made == [view]


def test_the_angles_of_the_longest_forward():
    """Per row: a step of decoding shows none, and a longer forward takes the place of a shorter one."""
    _, view = setting(size=6)
    view = dataclasses.replace(view, state={}, shared={})
    assert view.angle_step() is None
    step = torch.tensor([0.5, 0.1])

    def seen(length, angles, batch=2):
        at = torch.arange(length)[:, None] * angles
        whole = torch.cat([at, at], 1)
        return dataclasses.replace(view, rotary=(whole.cos()[None].expand(batch, -1, -1), whole.sin()[None]))

    assert seen(1, step).angle_step() is None
    two = dataclasses.replace(seen(2, step), state={}, shared={})
    assert is_close(two.angle_step(), step.expand(2, -1), CLOSE)  # two tokens are enough
    assert is_close(seen(3, step).angle_step(), step.expand(2, -1), CLOSE)
    assert is_close(seen(2, 2 * step).angle_step(), step.expand(2, -1), CLOSE)  # shorter
    assert is_close(seen(5, 2 * step).angle_step(), 2 * step.expand(2, -1), CLOSE)
    assert is_close(seen(1, step).angle_step(), 2 * step.expand(2, -1), CLOSE)  # as it is known
    fork = dataclasses.replace(view, state={}, shared=view.state)
    assert is_close(fork.angle_step(), 2 * step.expand(2, -1), CLOSE) and "angle_span" in fork.state


@pytest.mark.parametrize(
    ("spec", "cuts"),
    [
        ("snapkv:budget=1.0,window_size=4", True),  # its window has served after the prompt, and is gone
        ("snapkv:budget=1.0,window_size=4,schedule=step", False),
        ("knorm:budget=1.0,schedule=step", True),
        ("h2o:budget=1.0", False),
        ("full", True),
    ],
)
def test_which_caches_can_be_cut(spec, cuts):
    """Where nothing was dropped, and nothing gathered from queries that could not be taken back."""
    model = models.build("llama")
    with manyheads.use(model), torch.no_grad():
        cache = new_cache(model, parse(spec))
        for store in stores(cache):
            store.crop(3)  # nothing is there yet
        model(models.tokens(1, 9), past_key_values=cache, use_cache=True)
        for store in stores(cache):
            store.crop(0)
            if cuts:
                store.crop(2)
                assert store.seen == 7 and store.keys.shape[2] == 7
            else:
                with pytest.raises(UserError, match="cannot be cropped"):
                    store.crop(2)
                assert store.seen == 9


def after(spec, *lengths, grad=False, name="llama"):
    """The stores of a cache after forwards of so many tokens."""
    model = models.build(name)
    with manyheads.use(model), torch.set_grad_enabled(grad):
        for parameter in model.parameters():
            parameter.requires_grad_(grad)
        cache = new_cache(model, parse(spec))
        for length in lengths:
            model(models.tokens(1, length), past_key_values=cache, use_cache=True)
    return stores(cache)


def test_what_is_packed_and_what_is_not():
    """Encoded tokens and heads of unequal numbers; never what gradients go through, nor latents."""
    for spec, packed in (("fireq:window_tokens=4", True), ("adakv:base=knorm,budget=0.4", True), ("knorm", False)):
        for store in after(spec, 12):
            assert (store.tokens.ragged is not None) == packed and (store.tokens.padded is None) == packed
        for store in after(spec, 12, grad=True):
            assert store.tokens.ragged is None
    for store in after("adakv:base=knorm,budget=0.4", 12, name="deepseek_v3"):
        assert store.tokens.ragged is None


def test_encoded_tokens_cannot_be_cut():
    for store in after("fireq:window_tokens=4", 12):
        with pytest.raises(UserError, match="a packed cache cannot be cropped"):
            store.crop(2)
        assert store.seen == 12
    for store in after("adakv:base=knorm,budget=1.0", 12):  # nothing is encoded, nothing dropped
        store.crop(2)
        assert store.seen == 10
    for store in after("fireq:window_tokens=4", 12, grad=True):  # not packed, so not encoded yet
        store.crop(2)
        assert store.seen == 10
