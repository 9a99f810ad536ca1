# SPDX-License-Identifier: Apache-2.0
"""The plain INT4 cache: what attention reads of it, which bytes it holds, and that latents are stored alike."""

import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.attention.codec import INT4
from manyheads.integrations.transformers import new_cache
from oracles import caches, models
from tolerance import SAME, assert_close, error

PIECES = [16, 1, 1, 4, 1, 1]


def run(model, spec, ids):
    with torch.no_grad(), manyheads.use(model, spec):
        cache = new_cache(model, parse(spec))
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(PIECES, 1)], 1)


def stored(x, group):
    """``x [..., d]`` as symmetric four bits give it back, ``group`` channels to a scale; by hand."""
    parts = []
    for part in x.split(group, -1):
        scale = (part.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        parts.append((part / scale).round().clamp(-7, 7) * scale)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_attention_reads_what_is_stored(name, monkeypatch):
    """The same as a model whose own cache rounds what it is given."""
    from transformers.cache_utils import DynamicLayer

    model, ids = models.tiny(name), models.tokens(2, 24)
    got, full = run(model, "int4:group=4", ids), run(model, "full", ids)
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer, "update", lambda self, k, v, *a, **x: update(self, stored(k, 4), stored(v, 4), *a, **x)
    )
    with torch.no_grad():
        cache = None
        want = []
        for part in ids.split(PIECES, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            want.append(out.logits)
    assert_close(got, torch.cat(want, 1), 10 * SAME)
    assert error(got, full) > 100 * error(got, torch.cat(want, 1))  # control: the whole cache is another number


def test_codes_are_those_of_the_codec():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    codes, scale = INT4.encode(x)
    assert_close(INT4.decode(codes, scale, x.dtype), stored(x, 8), SAME)


def test_bytes_of_a_token():
    """Half a byte a channel, and a scale of 2 for each group; of an odd width one channel is stored beside."""
    model = models.tiny("llama")
    shape = model.config
    with manyheads.use(model):
        cache = caches.prefilled(model, "int4:group=4", models.tokens(1, 64))
    numbers = 2 * shape.num_key_value_heads * shape.head_dim
    assert cache.bytes() == 64 * shape.num_hidden_layers * (numbers // 2 + 2 * numbers // 4)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_it_is_a_cache(name):
    model = models.tiny(name, torch.float64)
    for group in (4, 32):
        caches.batch_equals_singles_padded_left(model, f"int4:group={group}")
    caches.beams_equal_singles(model, "int4:group=4")
    caches.rows_can_be_rearranged(models.tiny(name), "int4:group=4")
    caches.continues_where_it_was(models.tiny(name), "int4:group=4")


@pytest.mark.parametrize("group", [0, 3])
def test_groups_are_even(group):
    with pytest.raises(UserError, match="even number"):
        parse(f"int4:group={group}")
