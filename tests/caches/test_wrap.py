# SPDX-License-Identifier: Apache-2.0
"""A strategy around another: nested specs, what passes through, and combinations that make no sense."""

import pytest

import manyheads
from manyheads import UserError, parse
from manyheads.spec import split_list, split_outside
from oracles import caches, models
from tolerance import assert_close


def test_nested_specs():
    outer = parse("fireq:base=graphkv(base=snapkv(window_size=16,kernel_size=5),rounds=2),budget=0.25,window_tokens=8")
    middle = outer.inner
    assert (middle.slug, middle.rounds, middle.budget, middle.recent) == ("graphkv", 2, 0.25, 16)
    assert (middle.inner.slug, middle.inner.window_size, middle.inner.kernel_size) == ("snapkv", 16, 5)
    assert outer.window == 16 and parse(outer.spec) == outer
    assert parse("adakv(base=keydiff,budget=64)") == parse("adakv:base=keydiff,budget=64")
    assert parse("auto:budget=0.25") == parse("hedge:budget=0.25")


def test_lists_of_nested_specs():
    text = "full,graphkv:base=snapkv(window_size=16,kernel_size=5),budget=0.5,knorm"
    assert split_list(text) == ["full", "graphkv:base=snapkv(window_size=16,kernel_size=5),budget=0.5", "knorm"]
    assert split_outside("a, b(c,(d,e)),f") == ["a", "b(c,(d,e))", "f"]
    for wrong in ("a(b", "a)b(", "a(b))"):
        with pytest.raises(UserError, match="parentheses"):
            split_outside(wrong)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("graphkv:base=hashevict", "in a way of its own"),
        ("graphkv:base=mla_hw", "in a way of its own"),
        ("graphkv:base=full,budget=0.5", "keeps every token"),
        ("adakv:base=snapkv(budget=0.5)", "budget outside"),
        ("fireq:base=h2o,budget=0.5", "schedule=prefill"),
        ("fireq:base=nothing", "nothing"),
        ("snapkv:budget=8", "protected tokens"),
        ("adakv:base=snapkv,budget=8", "protected tokens"),
        ("graphkv:base=snapkv(window_size=0)", "window_size"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, match):
    with pytest.raises(UserError, match=match):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "base"),
    [
        ("graphkv:base=keydiff,num_sources=0,budget=0.5", "keydiff:budget=0.5"),
        ("adakv:base=snapkv(window_size=4),alpha=1,budget=0.5", "snapkv:window_size=4,budget=0.5"),
        ("pyramidkv:base=knorm,beta=1,budget=9", "knorm:budget=9"),
        ("graphkv:base=tova,num_sources=0,budget=9", "tova:budget=9"),
    ],
)
def test_around_nothing_it_is_the_base(spec, base):
    """With its own part switched off a wrapper is its base, schedule and all; switched on it is not."""
    model, ids = models.tiny("llama"), models.tokens(2, 30)
    with manyheads.use(model):
        a, b = caches.prefilled(model, spec, ids), caches.prefilled(model, base, ids)
        other = caches.prefilled(model, "random:budget=0.4", ids)
        for t in range(4):
            last = models.tokens(2, 1, seed=t)
            want = caches.step(model, last, b)
            assert_close(caches.step(model, last, a), want)
            with pytest.raises(AssertionError):
                assert_close(caches.step(model, last, other), want)
