# SPDX-License-Identifier: Apache-2.0
"""The plain FP8 cache: which bytes it holds, and what attention reads of them."""

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.attention.codec import FP8 as CODEC
from manyheads.caches.fp8 import FP8
from manyheads.integrations.transformers import new_cache
from manyheads.strategy import AttentionEdit
from oracles import caches, models
from tolerance import SAME, assert_close, error


class ByHand(AttentionEdit):
    """What came before this forward as e4m3 with a scale a vector gives it back."""

    def edit(self, call):
        old = call.k.shape[2] - call.q.shape[2]
        k, v = (
            torch.cat([CODEC.decode(*CODEC.encode(x[:, :, :old]), x.dtype), x[:, :, old:]], 2) for x in (call.k, call.v)
        )
        return call.replace(k=k, v=v)


def test_attention_reads_what_is_stored():
    model, ids = models.tiny("llama"), models.tokens(2, 24)

    def run(spec, *strategies):
        with torch.no_grad(), manyheads.use(model, *strategies):
            cache = new_cache(model, manyheads.parse(spec))
            pieces = ids.split([16, 1, 1, 4, 1, 1], 1)
            return torch.cat([model(part, past_key_values=cache).logits for part in pieces], 1)

    got, want, full = run("fp8"), run("full", ByHand()), run("full")
    assert_close(got, want, 10 * SAME)
    assert error(got, full) > 20 * error(got, want)  # control: the whole cache is another number


def test_bytes_of_a_token():
    model, sizes = models.tiny("llama"), {}
    with manyheads.use(model):
        for length in (64, 128):
            cache = caches.prefilled(model, "fp8", models.tokens(1, length))
            sizes[length] = cache.bytes()
    stores = caches.stores(cache)
    heads = stores[0].tokens.ragged.offsets.shape[1]
    assert (sizes[128] - sizes[64]) / 64 / len(stores) / heads == 2 * (8 + 2) + 4


def test_it_has_no_budget():
    with pytest.raises(UserError, match="every token"):
        FP8(budget=0.5)
