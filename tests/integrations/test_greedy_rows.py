# SPDX-License-Identifier: Apache-2.0
"""Replies in one batch: each row is what it would be alone, also where tails differ in length or rows end early."""

import copy

import pytest
import torch

import manyheads
from manyheads import parse
from manyheads.integrations.decoding import greedy, greedy_rows, takes_padding
from manyheads.integrations.transformers import new_cache
from oracles import models
from tolerance import SAME, assert_close, error

SPECS = {
    "full": "full",
    "even": "snapkv:budget=20,window_size=4",
    "ragged": "adakv:base=snapkv(window_size=4,kernel_size=3),budget=0.5",
    "packed": "fireq:window_tokens=8",
    "packed-fp8": "fireq:base=knorm,bits=fp8,budget=0.6,window_tokens=4",
    "one ranking": "hedge:budget=0.5,recent=4,whole=0",
    "every step": "tova:budget=24",
}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
TAILS = [models.tokens(n, seed=n).flatten().tolist() for n in (2, 6, 3)]


@pytest.fixture
def llama():
    """In float64: tokens are compared, and in float32 the logits nearly tie."""
    return models.build("llama", dtype=torch.float64)


def read(model, spec):
    cache = new_cache(model, parse(spec))
    with torch.no_grad():
        model(models.tokens(1, 40, seed=7), past_key_values=cache)
    return cache


def heard(model, run):
    """What ``run()`` makes, and the logits of every forward's last token."""
    logits = []
    hook = model.register_forward_hook(lambda *given: logits.append(given[2].logits[:, -1]))
    try:
        return run(), torch.stack(logits)
    finally:
        hook.remove()


def rows_of(cache, count):
    twin = copy.deepcopy(cache)
    twin.batch_repeat_interleave(count)
    return twin


@each
def test_rows_are_what_they_are_alone(llama, spec):
    with manyheads.use(llama):
        cache = read(llama, spec)
        padded = takes_padding(llama, cache)
        assert padded == (spec != SPECS["every step"])
        tails = TAILS if padded else [tail[:2] for tail in TAILS]
        together, logits = heard(llama, lambda: greedy_rows(llama, rows_of(cache, 3), tails, [5, 5, 5]))
        wrong = [[0] * (6 - len(tail)) + tail for tail in tails]  # padding that is read
        _, off = heard(llama, lambda: greedy_rows(llama, rows_of(cache, 3), wrong, [1, 1, 1]))
        for i, tail in enumerate(tails):
            alone, own = heard(llama, lambda tail=tail: greedy(llama, copy.deepcopy(cache), torch.tensor([tail]), 5))
            assert_close(logits[:, i], own[:, 0], 10 * SAME)
            assert together[i] == alone
            assert len(tail) == 6 or error(off[0, i], own[0, 0]) > 30 * SAME


@each
def test_rows_that_end_leave_the_batch(llama, spec):
    with manyheads.use(llama):
        cache = read(llama, spec)
        tails = TAILS if takes_padding(llama, cache) else [tail[:2] for tail in TAILS]
        whole = greedy_rows(llama, rows_of(cache, 3), tails, [6, 6, 6])
        others = {token for made in (whole[0], whole[2]) for token in made}
        new = [i for i in range(2, 6) if whole[1][i] not in others.union(whole[1][:i])]
        ends = {whole[1][i] for i in new[:1]}  # not before two steps of all three rows
        sizes = []
        hook = llama.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        found = greedy_rows(
            llama, rows_of(cache, 3), tails, [6, 6, 2], ends=ends, settled=[lambda made: len(made) == 5, None, None]
        )  # fmt: skip
        hook.remove()
        stop = next((i for i, token in enumerate(whole[1]) if token in ends), 6)
        assert found == [whole[0][:5], whole[1][:stop], whole[2][:2]]
        assert sizes[0] == sizes[1] == 3 and sizes[-1] < 3


def test_where_padding_would_change_a_row(llama):
    """A window counts columns, a schedule counts tokens, and what is kept whole up to a length counts them too."""
    gemma = models.build("gemma3_text", dtype=torch.float64)
    with manyheads.use(gemma):
        assert not takes_padding(gemma, read(gemma, "keydiff"))
    with manyheads.use(llama):
        for spec, takes in (("knorm", True), ("knorm:schedule=turn", False), ("hedge:budget=0.5", False)):
            assert takes_padding(llama, read(llama, spec)) == takes, spec
