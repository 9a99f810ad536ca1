# SPDX-License-Identifier: Apache-2.0
"""Hedge with KVzip's score for the unknown question: its extremes are strategies that are tested by themselves."""

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.caches.hedge import Hedge
from manyheads.caches.kvzip import KVzip
from manyheads.integrations.transformers import new_cache
from oracles import caches, models

LENGTH = 40
TOKENS = {"bits": "none", "whole": 0, "sinks": 2, "recent": 0, "window_size": 8, "budget": 0.4, "instruct": False}
CHOICES = ("distinctness", "reconstruction")
ALL, NONE = 1 - 1e-4, 1e-4  # of the ranking by the unknown question: beyond what places can make up for


@pytest.fixture(scope="module")
def model():
    return models.build("llama", num_key_value_heads=2).double()


def kept(model, policy, ids):
    with manyheads.use(model):
        cache = caches.prefilled(model, policy, ids)
        assert int(cache.get_seq_length()) == ids.shape[1]
        assert all("reconstruction" not in store.state for store in caches.stores(cache))
    return [
        (store.site.window, [sorted(p for p in head if p >= 0) for head in store.live.positions()[0].tolist()])
        for store in caches.stores(cache)
    ]


def test_alone_it_is_kvzip(model):
    ids = models.tokens(1, LENGTH)
    again = kept(model, Hedge(**TOKENS, distinct=ALL, agnostic="reconstruction", chunk_size=15), ids)
    assert again == kept(model, KVzip(budget=0.4, sinks=2, instruct=False, chunk_size=15), ids)
    assert again != kept(model, Hedge(**TOKENS, distinct=ALL), ids)


def test_foresight_does_not_know_of_it(model):
    ids = models.tokens(1, LENGTH)
    for part, same in ((NONE, True), (0.5, False)):
        plain, again = (kept(model, Hedge(**TOKENS, distinct=part, agnostic=x), ids) for x in CHOICES)
        assert (plain == again) == same


def test_sliding_windows_go_by_distinctness():
    model = models.build("gemma2").double()
    plain, again = (kept(model, Hedge(**TOKENS, agnostic=x), models.tokens(1, LENGTH)) for x in CHOICES)
    same = [(window is not None, a == b) for (window, a), (_, b) in zip(plain, again, strict=True)]
    assert set(same) == {(True, True), (False, False)}


@pytest.mark.parametrize("bits", ["int4", "fp8"])
def test_packed_it_holds_the_bytes_of_the_other(bits):
    wide, ids = models.build("llama", head_dim=64, num_key_value_heads=2).to(torch.bfloat16), models.tokens(1, 600)
    fields = {"budget": 0.25, "bits": bits, "instruct": False}
    with manyheads.use(wide):
        plain, again = (caches.prefilled(wide, Hedge(**fields, agnostic=x), ids) for x in CHOICES)
        whole = caches.prefilled(wide, "full", ids).bytes()
        assert plain.bytes() == pytest.approx(again.bytes(), rel=0.01) and again.bytes() <= 0.25 * whole
        assert bool(caches.step(wide, models.tokens(1, 1), again).isfinite().all())


def test_refusals(model):
    with pytest.raises(UserError, match="schedule is prefill"):
        Hedge(agnostic="reconstruction", schedule="turn")
    with manyheads.use(model), pytest.raises(UserError, match="of its own"):
        shared = new_cache(model, manyheads.parse("full"), record=16)
        caches.step(model, models.tokens(1, 12), shared)
        shared.fork(Hedge(**TOKENS, agnostic="reconstruction"))
    latent = models.tiny("deepseek_v3")
    with manyheads.use(latent), pytest.raises(UserError, match="latents"):
        caches.prefilled(latent, Hedge(**TOKENS, agnostic="reconstruction"), models.tokens(1, LENGTH))
